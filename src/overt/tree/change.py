"""Names removed and moved in the upper (fs/overlayfs/dir.c).

Each change is one atomic step on the upper (RENAME_WHITEOUT, RENAME_EXCHANGE): a crash between two of them leaves
something in the work directory, never a half change in sight.
"""

import errno
import os
import stat

from overt.host.files import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, renameat2
from overt.overlay import marks, protection
from overt.tree.copies import has_origin, make_impure
from overt.tree.copyup import carry, copy_up
from overt.tree.flags import refuse, refuse_removal
from overt.tree.layer import UPPER
from overt.tree.node import Node
from overt.tree.places import keep_places
from overt.tree.reading import entries, is_empty
from overt.tree.steps import clean, failure, has_whiteout, relist, set_opaque, set_redirect, upper_of
from overt.tree.tree import Tree

# Names that go


def _hidden_below(tree: Tree, parent: Node, name: bytes) -> bool:
    """Whether a lower layer shows this name, so that taking it away needs a whiteout (ovl_lower_positive)."""
    for layer in parent.layers:
        if layer == UPPER:
            continue
        directory = tree.dir_fd(parent, layer)
        if tree.whiteouts_are_files and tree.is_mark(layer, name):
            return False
        try:
            st = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            if tree.whiteouts_are_files and tree.is_gone(layer, directory, name):
                return False
            continue
        if marks.is_whiteout(st.st_mode, st.st_rdev):
            return False
        return not tree.layers[layer].is_xattr_whiteout(directory, name, st)
    return False


def unlink(tree: Tree, parent: Node, name: bytes) -> Node:
    """unlink(2); the node that had the name."""
    node, _ = tree.lookup(parent, name)
    if node.is_dir:
        raise failure(errno.EISDIR)
    refuse_removal(tree, parent, node)
    upper = upper_of(tree, parent)
    _give_to_upper(tree, node, parent, name)
    hidden = _hidden_below(tree, parent, name)
    anchor = tree.hold(node, parent, name)
    try:
        if node.layer != UPPER:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=upper)
            node.dropped = True
        elif hidden:
            temporary = tree.temporary()
            renameat2(upper, name, tree.work, temporary, RENAME_WHITEOUT)
            clean(os.unlink, temporary, tree.work)
        else:
            os.unlink(name, dir_fd=upper)
    except OSError:
        if anchor >= 0:
            os.close(anchor)
        raise
    tree.unname(node, parent, name, anchor)
    relist(tree, parent, name, None)
    _unlinked(tree, node)
    return node


def remove_dir(tree: Tree, parent: Node, name: bytes) -> Node:
    """rmdir(2): the merged directory has to be empty; whiteouts in its upper part go with it."""
    node, _ = tree.lookup(parent, name)
    if not node.is_dir:
        raise failure(errno.ENOTDIR)
    refuse_removal(tree, parent, node)
    if not is_empty(tree, node):
        raise failure(errno.ENOTEMPTY)
    upper = upper_of(tree, parent)
    hidden = _hidden_below(tree, parent, name)
    anchor = tree.hold(node, parent, name)
    try:
        if node.layer != UPPER:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=upper)
        elif hidden:
            temporary = tree.temporary()
            renameat2(upper, name, tree.work, temporary, RENAME_WHITEOUT)
            clean(_remove_emptied, temporary, tree.work)
        else:
            try:
                os.rmdir(name, dir_fd=upper)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
                temporary = tree.temporary()
                os.rename(name, temporary, src_dir_fd=upper, dst_dir_fd=tree.work)
                clean(_remove_emptied, temporary, tree.work)
    except OSError:
        if anchor >= 0:
            os.close(anchor)
        raise
    node.dropped = True
    node.layers = node.layers[:1]
    tree.unname(node, parent, name, anchor)
    relist(tree, parent, name, None)
    return node


def _remove_emptied(name: bytes, *, dir_fd: int) -> None:
    """Remove a directory of the upper in which there are only whiteouts."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        for entry in entries(fd):
            os.unlink(entry.name, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=dir_fd)


def _clear(tree: Tree, node: Node, upper: int, name: bytes) -> None:
    """Put an empty opaque directory in the place of one that holds only whiteouts (ovl_clear_empty)."""
    fresh = tree.temporary()
    os.mkdir(fresh, 0o700, dir_fd=tree.work)
    try:
        st = os.stat(name, dir_fd=upper, follow_symlinks=False)
        carry(tree, UPPER, upper, name, st, fresh, tree.notes(node, st))
        set_opaque(tree, tree.work, fresh)
        renameat2(tree.work, fresh, upper, name, RENAME_EXCHANGE)
    except OSError:
        os.rmdir(fresh, dir_fd=tree.work)
        raise
    tree.replaced(node)
    clean(_remove_emptied, fresh, tree.work)


# Names that move


def rename(tree: Tree, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int) -> None:
    """renameat2(2) with NOREPLACE or EXCHANGE; EXDEV for a directory with a lower part unless redirect_dir=on."""
    if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
        raise failure(errno.EINVAL)
    node, _ = tree.lookup(parent, name)
    try:
        target: Node | None = tree.lookup(new_parent, new_name)[0]
    except FileNotFoundError:
        target = None
    exchange = bool(flags & RENAME_EXCHANGE)
    if target is None and exchange:
        raise failure(errno.ENOENT)
    if target is not None and flags & RENAME_NOREPLACE:
        raise failure(errno.EEXIST)
    if target is node:
        return
    refuse_removal(tree, parent, node)
    if target is not None:
        refuse_removal(tree, new_parent, target)
    else:
        refuse(tree, new_parent, protection.IMMUTABLE)
    if not tree.redirects and (_has_lower(node) or (exchange and target and _has_lower(target))):
        raise failure(errno.EXDEV)
    if target is not None and not exchange:
        if node.is_dir != target.is_dir:
            raise failure(errno.ENOTDIR if node.is_dir else errno.EISDIR)
        if target.is_dir and not is_empty(tree, target):
            raise failure(errno.ENOTEMPTY)
    copy_up(tree, node, called=(parent, name))
    new_upper = upper_of(tree, new_parent)
    upper = upper_of(tree, parent)
    _give_to_upper(tree, node, parent, name)
    if target is not None:
        _give_to_upper(tree, target, new_parent, new_name)
    hidden_here = _hidden_below(tree, parent, name)
    hidden_there = _hidden_below(tree, new_parent, new_name)
    if has_origin(tree, node):
        make_impure(tree, new_parent)
    if exchange:
        assert target is not None
        copy_up(tree, target, called=(new_parent, new_name))
        same = parent is new_parent
        _prepare_to_move(tree, node, parent, name, hidden=hidden_there, same=same)
        _prepare_to_move(tree, target, new_parent, new_name, hidden=hidden_here, same=same)
        if has_origin(tree, target):
            make_impure(tree, parent)
        renameat2(upper, name, new_upper, new_name, RENAME_EXCHANGE)
        _exchange_names(tree, node, (parent, name), target, (new_parent, new_name))
        return
    _prepare_to_move(tree, node, parent, name, hidden=hidden_there, same=parent is new_parent)
    anchor = tree.hold(target, new_parent, new_name) if target is not None else -1
    try:
        _move(tree, (upper, name), (new_upper, new_name), node, target, whiteout=hidden_here)
    except OSError:
        if anchor >= 0:
            os.close(anchor)
        raise
    if target is not None:
        if target.layer != UPPER or target.is_dir:
            target.dropped = True
            target.layers = target.layers[:1]
        tree.unname(target, new_parent, new_name, anchor)
        _unlinked(tree, target)
    tree.move_name(node, parent, name, new_parent, new_name)
    relist(tree, parent, name, None)
    relist(tree, new_parent, new_name, node)


def _has_lower(node: Node) -> bool:
    return node.is_dir and node.layers != (UPPER,)


def _give_to_upper(tree: Tree, node: Node, parent: Node, name: bytes) -> None:
    """A name that is to go or to change: a file in the index gets it in the upper first (ovl_nlink_start)."""
    if node.index is not None and tree.index is not None:
        copy_up(tree, node, called=(parent, name))
        tree.index.link_up(tree, node, parent, name)
        tree.index.settle(tree, node)


def _unlinked(tree: Tree, node: Node) -> None:
    if node.index is not None and tree.index is not None:
        tree.index.unlinked(tree, node)


def _prepare_to_move(tree: Tree, node: Node, parent: Node, name: bytes, *, hidden: bool, same: bool) -> None:
    """Write down, while something still has a name, what is to be below it when it has another.

    `hidden`: a lower layer has the new name; `same`: the new name is in the same directory.
    """
    if _has_lower(node) or node.data is not None:
        set_redirect(tree, node, parent, name, same=same and node.index is None)
        keep_places(node)
    elif node.is_dir and hidden:
        set_opaque(tree, tree.dir_fd(parent, UPPER), name)


def _move(
    tree: Tree, source: tuple[int, bytes], place: tuple[int, bytes], node: Node, target: Node | None, *, whiteout: bool
) -> None:
    """Move a file of the upper in one step, leaving a whiteout where one is needed."""
    if node.is_dir and target is not None and target.layer == UPPER:
        fd = os.open(place[1], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place[0])
        try:
            emptied = next(iter(entries(fd)), None) is not None
        finally:
            os.close(fd)
        if emptied:
            _clear(tree, target, *place)
    elif node.is_dir and has_whiteout(*place):
        # A directory cannot replace a whiteout; they change places, and the whiteout stays if one is needed there.
        renameat2(*source, *place, RENAME_EXCHANGE)
        if not whiteout:
            clean(os.unlink, source[1], source[0])
        return
    renameat2(*source, *place, RENAME_WHITEOUT if whiteout else 0)


def _exchange_names(tree: Tree, node: Node, here: tuple[Node, bytes], target: Node, there: tuple[Node, bytes]) -> None:
    tree.move_name(node, *here, *there)
    children = there[0].children
    assert children is not None
    if target.parent is there[0] and target.name == there[1]:
        target.parent, target.name = here
    elif target.links:
        target.links.discard(there)
        target.links.add(here)
    if here[0].children is None:
        here[0].children = {}
    here[0].children[here[1]] = target
    children[there[1]] = node
    relist(tree, *here, target)
    relist(tree, *there, node)
