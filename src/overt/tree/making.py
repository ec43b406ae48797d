"""Names made in the upper (fs/overlayfs/dir.c).

Each is one atomic step on the upper (RENAME_EXCHANGE, a rename from the work directory): a crash before it leaves
something in the work directory, never a half-made file in sight.
"""

import errno
import os
import stat
from collections.abc import Callable

from overt.host.files import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
from overt.overlay import marks
from overt.overlay.listing import Listing
from overt.tree.copies import has_origin, make_impure
from overt.tree.copyup import copy_up
from overt.tree.flags import refuse
from overt.tree.layer import UPPER, xattr_path
from overt.tree.node import Node
from overt.tree.steps import clean, failure, has_whiteout, relist, set_opaque, set_redirect, upper_of
from overt.tree.tree import Tree

_DEFAULT_ACL = b"system.posix_acl_default"


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


def tmpfile(tree: Tree, parent: Node, flags: int, mode: int) -> tuple[Node, os.stat_result, int]:
    """open(2) with O_TMPFILE."""
    upper = upper_of(tree, parent)
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
    node.protection = 0
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
        raise failure(errno.EPERM)
    _make(tree, parent, name, lambda directory, as_name: os.mknod(as_name, mode, rdev, dir_fd=directory))
    return _look(tree, parent, name)


def symlink(tree: Tree, parent: Node, name: bytes, target: bytes) -> tuple[Node, os.stat_result]:
    """symlink(2)."""
    _make(tree, parent, name, lambda directory, as_name: os.symlink(target, as_name, dir_fd=directory))
    return _look(tree, parent, name)


def link(tree: Tree, node: Node, parent: Node, name: bytes) -> os.stat_result:
    """link(2): one more name for a file, which is copied up first."""
    refuse(tree, node)
    upper = upper_of(tree, parent)
    copy_up(tree, node)
    if node.data is not None and node.anchor < 0:
        set_redirect(tree, node, *tree.place(node), same=False)
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
    relist(tree, parent, name, node)
    return tree.shown(node, os.stat(name, dir_fd=upper, follow_symlinks=False))


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
    upper = upper_of(tree, parent)
    unfinished = new and tree.finishes
    over = unfinished and has_whiteout(upper, name)
    if not unfinished:
        try:
            make(upper, name)
            return
        except FileExistsError:
            if not has_whiteout(upper, name):
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
                set_opaque(tree, made_in, temporary)
                renameat2(made_in, temporary, upper, name, RENAME_EXCHANGE)
            else:
                os.rename(temporary, name, src_dir_fd=made_in, dst_dir_fd=upper)
        except OSError:
            (os.rmdir if directory else os.unlink)(temporary, dir_fd=made_in)
            raise
        if directory and over:
            clean(os.unlink, temporary, made_in)
    finally:
        if cradle:
            os.close(made_in)
            clean(os.rmdir, cradle, tree.work)


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


def _entered(tree: Tree, parent: Node, name: bytes, st: os.stat_result) -> tuple[Node, os.stat_result]:
    node = tree.enter(parent, name, (UPPER,), st)
    node.protection = 0
    relist(tree, parent, name, node)
    return node, _seen(tree, node, st)


def _seen(tree: Tree, node: Node, st: os.stat_result) -> os.stat_result:
    """What is to be shown of a new file. If that cannot be had, the kernel is not told of its node."""
    try:
        return tree.shown(node, st)
    except OSError:
        tree.unused(node)
        raise


def _look(tree: Tree, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
    st = os.stat(name, dir_fd=tree.dir_fd(parent, UPPER), follow_symlinks=False)
    return _entered(tree, parent, name, st)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
