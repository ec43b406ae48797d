"""Names made, removed and moved in the upper (fs/overlayfs/dir.c).

What a lower layer has under a name is hidden by a whiteout in the upper. Each change is one atomic step on the upper
(RENAME_WHITEOUT, RENAME_EXCHANGE, a link from the work directory): a crash between two of them leaves something in the
work directory, never a half change in sight.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator

from overt.host.files import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, renameat2
from overt.overlay import marks
from overt.overlay.listing import DT_UNKNOWN, Entry, Listing
from overt.overlay.redirect import absolute
from overt.tree.copies import has_origin, make_impure
from overt.tree.copyup import carry, copy_up
from overt.tree.layer import UPPER, xattr_path
from overt.tree.node import Node
from overt.tree.places import keep_places
from overt.tree.reading import entries, is_empty
from overt.tree.tree import Tree

_DEFAULT_ACL = b"system.posix_acl_default"


def _fail(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def _upper(tree: Tree, directory: Node) -> int:
    """The upper's descriptor of a directory in which something is to change."""
    if directory.dropped or (directory.anchor >= 0 and directory.parent is not None):
        raise _fail(errno.ENOENT)
    copy_up(tree, directory)
    return tree.dir_fd(directory, UPPER)


def _has_whiteout(directory: int, name: bytes) -> bool:
    try:
        st = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return marks.is_whiteout(st.st_mode, st.st_rdev)


def hidden_below(tree: Tree, parent: Node, name: bytes) -> bool:
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


# New names


def _make(
    tree: Tree,
    parent: Node,
    name: bytes,
    make: Callable[[int, bytes], None],
    *,
    directory: bool = False,
    new: bool = True,
) -> None:
    """Make a name: at once; or out of sight and then in its place, where the upper has a whiteout of that name, or a
    `new` file lacks something when it is made.
    """
    upper = _upper(tree, parent)
    unfinished = new and tree.finishes
    over = unfinished and _has_whiteout(upper, name)
    if not unfinished:
        try:
            make(upper, name)
            return
        except FileExistsError:
            if not _has_whiteout(upper, name):
                raise
            over = True
    cradle, made_in = _cradle(tree, upper)
    temporary = tree.temporary()
    try:
        make(made_in, temporary)
        try:
            if unfinished:
                tree.finish(parent, xattr_path(made_in, temporary))
            if not over:
                renameat2(made_in, temporary, upper, name, RENAME_NOREPLACE)
            elif directory:
                _set_opaque(tree, made_in, temporary)
                renameat2(made_in, temporary, upper, name, RENAME_EXCHANGE)
            else:
                os.rename(temporary, name, src_dir_fd=made_in, dst_dir_fd=upper)
        except OSError:
            (os.rmdir if directory else os.unlink)(temporary, dir_fd=made_in)
            raise
        if directory and over:
            _clean(os.unlink, temporary, made_in)
    finally:
        if cradle:
            os.close(made_in)
            _clean(os.rmdir, cradle, tree.work)


def _clean(remove: Callable[..., None], name: bytes, directory: int) -> None:
    """Remove what a change has left over. The change is made by then, so that this fails is no failure of it.

    What stays is in the work directory, which the next mount clears; or it is a whiteout that hides nothing.
    """
    with contextlib.suppress(OSError):
        remove(name, dir_fd=directory)


def _cradle(tree: Tree, upper: int) -> tuple[bytes, int]:
    """Where to make something that is to be moved over a whiteout in `upper`: (temporary name or b"", descriptor).

    What a new file inherits (the group under a setgid directory, a default ACL) the kernel gives it by the directory
    that it is made in; so that directory gets both, and nothing has to be worked out twice.
    """
    st = os.fstat(upper)
    try:
        acl = os.getxattr(b"/proc/self/fd/%d" % upper, _DEFAULT_ACL)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        acl = b""
    if not acl and not st.st_mode & stat.S_ISGID:
        return b"", tree.work
    cradle = tree.temporary()
    os.mkdir(cradle, 0o700, dir_fd=tree.work)
    try:
        os.chown(cradle, st.st_uid, st.st_gid, dir_fd=tree.work)
        os.chmod(cradle, 0o700 | st.st_mode & stat.S_ISGID, dir_fd=tree.work)
        if acl:
            os.setxattr(xattr_path(tree.work, cradle), _DEFAULT_ACL, acl)
        return cradle, os.open(cradle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree.work)
    except OSError:
        os.rmdir(cradle, dir_fd=tree.work)
        raise


def _set_opaque(tree: Tree, directory: int, name: bytes) -> None:
    os.setxattr(xattr_path(directory, name), tree.prefix + marks.OPAQUE, marks.OPAQUE_YES)


def _entered(tree: Tree, parent: Node, name: bytes, st: os.stat_result) -> tuple[Node, os.stat_result]:
    node = tree.enter(parent, name, (UPPER,), st)
    _list(tree, parent, name, node)
    return node, _seen(tree, node, st)


def _seen(tree: Tree, node: Node, st: os.stat_result) -> os.stat_result:
    """What is to be shown of a new file. If that cannot be had, the kernel is not told of its node."""
    try:
        return tree.shown(node, st)
    except OSError:
        tree.unused(node)
        raise


def _list(tree: Tree, parent: Node, name: bytes, node: Node | None) -> None:
    """Keep a directory's listing up to date."""
    listing = parent.listing
    if listing is None:
        return
    before = len(listing)
    if node is None:
        listing.discard(name)
    else:
        listing.add(Entry(node.ino, node.mode >> 12 if node.mode else DT_UNKNOWN, name, UPPER))
    tree.kept.changed(parent, len(listing) - before)
    if listing.gaps > len(listing) + 64 and not parent.readers:
        tree.kept.forget(parent)
        parent.listing = None  # nobody holds a cookie of it: it is made anew when it is needed


def create(tree: Tree, parent: Node, name: bytes, flags: int, mode: int) -> tuple[Node, os.stat_result, int]:
    """open(2) with O_CREAT of a name that is not there: (node, attributes, descriptor); FileExistsError if it is."""

    made: list[int] = []

    def make(directory: int, as_name: bytes) -> None:
        how = flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        made.append(os.open(as_name, how, mode, dir_fd=directory))

    try:
        _make(tree, parent, name, make)
        node, st = _entered(tree, parent, name, os.fstat(made[0]))
    except OSError:
        _close(made)
        raise
    return node, st, made[0]


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def tmpfile(tree: Tree, parent: Node, flags: int, mode: int) -> tuple[Node, os.stat_result, int]:
    """open(2) with O_TMPFILE."""
    upper = _upper(tree, parent)
    made = [os.open(b".", flags & ~os.O_CREAT | os.O_TMPFILE | os.O_CLOEXEC, mode, dir_fd=upper)]
    try:
        made.append(os.open(b"/proc/self/fd/%d" % made[0], os.O_PATH | os.O_CLOEXEC))
        if tree.finishes:
            tree.finish(parent, b"/proc/self/fd/%d" % made[0], follow=True)
        st = os.fstat(made[0])
    except OSError:
        _close(made)
        raise
    fd, anchor = made
    node = tree.enter_nameless(st, anchor)
    try:
        return node, _seen(tree, node, st), fd
    except OSError:
        os.close(fd)
        raise


def mkdir(tree: Tree, parent: Node, name: bytes, mode: int) -> tuple[Node, os.stat_result]:
    """mkdir(2)."""
    _make(tree, parent, name, lambda directory, as_name: os.mkdir(as_name, mode, dir_fd=directory), directory=True)
    made = _look(tree, parent, name)
    made[0].impure = False
    made[0].listing = Listing([])  # so that nobody asks the layer whether the first names in it are there
    tree.kept.keep(made[0])
    return made


def mknod(tree: Tree, parent: Node, name: bytes, mode: int, rdev: int) -> tuple[Node, os.stat_result]:
    """mknod(2); EPERM for a character device 0:0, which is a whiteout."""
    if marks.is_whiteout(mode, rdev):
        raise _fail(errno.EPERM)
    _make(tree, parent, name, lambda directory, as_name: os.mknod(as_name, mode, rdev, dir_fd=directory))
    return _look(tree, parent, name)


def symlink(tree: Tree, parent: Node, name: bytes, target: bytes) -> tuple[Node, os.stat_result]:
    """symlink(2)."""
    _make(tree, parent, name, lambda directory, as_name: os.symlink(target, as_name, dir_fd=directory))
    return _look(tree, parent, name)


def _look(tree: Tree, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
    st = os.stat(name, dir_fd=tree.dir_fd(parent, UPPER), follow_symlinks=False)
    return _entered(tree, parent, name, st)


def link(tree: Tree, node: Node, parent: Node, name: bytes) -> os.stat_result:
    """link(2): one more name for a file, which is copied up first."""
    upper = _upper(tree, parent)
    copy_up(tree, node)
    if node.data is not None and node.anchor < 0:
        _set_redirect(tree, node, *tree.place(node), same=False)
    if node.index is not None and tree.index is not None:
        tree.index.settle(tree, node)

    def make(directory: int, as_name: bytes) -> None:
        if node.anchor >= 0:
            os.link(b"/proc/self/fd/%d" % node.anchor, as_name, dst_dir_fd=directory, follow_symlinks=True)
        else:
            source, known = tree.at(node)
            os.link(known, as_name, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False)

    if has_origin(tree, node):
        make_impure(tree, parent)
    _make(tree, parent, name, make, new=False)
    tree.link_name(node, parent, name)
    _list(tree, parent, name, node)
    return tree.shown(node, os.stat(name, dir_fd=upper, follow_symlinks=False))


# Names that go


def unlink(tree: Tree, parent: Node, name: bytes) -> Node:
    """unlink(2); the node that had the name."""
    node, _ = tree.lookup(parent, name)
    if node.is_dir:
        raise _fail(errno.EISDIR)
    upper = _upper(tree, parent)
    _give_to_upper(tree, node, parent, name)
    hidden = hidden_below(tree, parent, name)
    anchor = tree.hold(node, parent, name)
    try:
        if node.layer != UPPER:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=upper)
            node.dropped = True
        elif hidden:
            temporary = tree.temporary()
            renameat2(upper, name, tree.work, temporary, RENAME_WHITEOUT)
            _clean(os.unlink, temporary, tree.work)
        else:
            os.unlink(name, dir_fd=upper)
    except OSError:
        if anchor >= 0:
            os.close(anchor)
        raise
    tree.unname(node, parent, name, anchor)
    _list(tree, parent, name, None)
    _unlinked(tree, node)
    return node


def remove_dir(tree: Tree, parent: Node, name: bytes) -> Node:
    """rmdir(2): the merged directory has to be empty; whiteouts in its upper part go with it."""
    node, _ = tree.lookup(parent, name)
    if not node.is_dir:
        raise _fail(errno.ENOTDIR)
    if not is_empty(tree, node):
        raise _fail(errno.ENOTEMPTY)
    upper = _upper(tree, parent)
    hidden = hidden_below(tree, parent, name)
    anchor = tree.hold(node, parent, name)
    try:
        if node.layer != UPPER:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=upper)
        elif hidden:
            temporary = tree.temporary()
            renameat2(upper, name, tree.work, temporary, RENAME_WHITEOUT)
            _clean(_remove_emptied, temporary, tree.work)
        else:
            try:
                os.rmdir(name, dir_fd=upper)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
                temporary = tree.temporary()
                os.rename(name, temporary, src_dir_fd=upper, dst_dir_fd=tree.work)
                _clean(_remove_emptied, temporary, tree.work)
    except OSError:
        if anchor >= 0:
            os.close(anchor)
        raise
    node.dropped = True
    node.layers = node.layers[:1]
    tree.unname(node, parent, name, anchor)
    _list(tree, parent, name, None)
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
        _set_opaque(tree, tree.work, fresh)
        renameat2(tree.work, fresh, upper, name, RENAME_EXCHANGE)
    except OSError:
        os.rmdir(fresh, dir_fd=tree.work)
        raise
    tree.replaced(node)
    _clean(_remove_emptied, fresh, tree.work)


# Names that move


def rename(tree: Tree, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int) -> None:
    """renameat2(2) with NOREPLACE or EXCHANGE; EXDEV for a directory with a lower part unless redirect_dir=on."""
    if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
        raise _fail(errno.EINVAL)
    node, _ = tree.lookup(parent, name)
    try:
        target: Node | None = tree.lookup(new_parent, new_name)[0]
    except FileNotFoundError:
        target = None
    exchange = bool(flags & RENAME_EXCHANGE)
    if target is None and exchange:
        raise _fail(errno.ENOENT)
    if target is not None and flags & RENAME_NOREPLACE:
        raise _fail(errno.EEXIST)
    if target is node:
        return
    if not tree.redirects and (_has_lower(node) or (exchange and target and _has_lower(target))):
        raise _fail(errno.EXDEV)
    if target is not None and not exchange:
        if node.is_dir != target.is_dir:
            raise _fail(errno.ENOTDIR if node.is_dir else errno.EISDIR)
        if target.is_dir and not is_empty(tree, target):
            raise _fail(errno.ENOTEMPTY)
    copy_up(tree, node, called=(parent, name))
    new_upper = _upper(tree, new_parent)
    upper = _upper(tree, parent)
    _give_to_upper(tree, node, parent, name)
    if target is not None:
        _give_to_upper(tree, target, new_parent, new_name)
    hidden_here = hidden_below(tree, parent, name)
    hidden_there = hidden_below(tree, new_parent, new_name)
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
    _list(tree, parent, name, None)
    _list(tree, new_parent, new_name, node)


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
        _set_redirect(tree, node, parent, name, same=same and node.index is None)
        keep_places(node)
    elif node.is_dir and hidden:
        _set_opaque(tree, tree.dir_fd(parent, UPPER), name)


def _set_redirect(tree: Tree, node: Node, parent: Node, name: bytes, *, same: bool) -> None:
    """Where its lower part is, from now on under whichever name (ovl_set_redirect); EXDEV if that cannot be said."""
    if node.redirect is not None and (same or node.redirect.startswith(b"/")):
        return
    if tree.index is not None and parent is tree.index.place:  # no name is known, and the entry's is none
        place = node.data.place if node.data is not None else None
        value = b"/" + b"/".join(place) if place else None
    else:
        value = name if same else absolute(((name, node.redirect), *_upwards(parent)))
    if value is None:
        raise _fail(errno.EXDEV)
    try:
        os.setxattr(tree.path(node), tree.prefix + marks.REDIRECT, value, follow_symlinks=False)
    except OSError:
        raise _fail(errno.EXDEV) from None  # who renames then copies and deletes, as between filesystems
    node.redirect = value


def _upwards(node: Node) -> Iterator[tuple[bytes, bytes | None]]:
    while node.parent is not None:
        yield node.name, node.redirect
        node = node.parent


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
    elif node.is_dir and _has_whiteout(*place):
        # A directory cannot replace a whiteout; they change places, and the whiteout stays if one is needed there.
        renameat2(*source, *place, RENAME_EXCHANGE)
        if not whiteout:
            _clean(os.unlink, source[1], source[0])
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
    _list(tree, *here, target)
    _list(tree, *there, node)
