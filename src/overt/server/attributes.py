"""Attributes: GETATTR, SETATTR, xattrs, STATFS."""

import errno
import fcntl
import os
import stat
import time

from overt.fuse.attr import Validity
from overt.fuse.request import Request
from overt.host.files import UTIME_NOW, UTIME_OMIT, utimensat
from overt.host.files import statx as host_statx
from overt.host.libc import AT_EMPTY_PATH, AT_SYMLINK_NOFOLLOW
from overt.overlay import protection
from overt.server import caller, identity
from overt.server.mount import UNTIL_ASKED, Mount
from overt.tree.copyup import Filling, changing, copy_up
from overt.tree.data import blocks_of_data
from overt.tree.flags import protection_of, refuse
from overt.tree.layer import UPPER
from overt.tree.node import Node
from overt.tree.tree import Tree
from overt.wire import fuse
from overt.wire.record import unpack_from

Reply = bytes | memoryview | None

_CAPABILITY = b"security.capability"
_USUAL = (b"user.", b"trusted.", b"security.", b"system.posix_acl_")
"""what the names of xattrs begin with that every layer can have"""
_TOUCH = fuse.FATTR_ATIME | fuse.FATTR_MTIME | fuse.FATTR_ATIME_NOW | fuse.FATTR_MTIME_NOW
"""utimensat(2) without times, which is no more than a write would do"""
_CHANGES = (
    fuse.FATTR_MODE | fuse.FATTR_UID | fuse.FATTR_GID | fuse.FATTR_SIZE | fuse.FATTR_ATIME | fuse.FATTR_MTIME
    | fuse.FATTR_KILL_SUIDGID
)  # fmt: skip


def getattr_(mount: Mount, request: Request) -> Reply:
    """GETATTR."""
    node = mount.tree.node(request.nodeid)
    valid = _valid(mount, request, node)
    return mount.session.attr(request.unique, valid, mount.attr(node, mount.tree.stat(node)))


def statx(mount: Mount, request: Request) -> Reply:
    """STATX: asked when somebody wants the time of birth, which GETATTR cannot carry."""
    tree = mount.tree
    node = tree.node(request.nodeid)
    valid = _valid(mount, request, node)
    if node.anchor >= 0:
        raw = host_statx(node.anchor, b"", AT_EMPTY_PATH, request.arg[3])
    else:
        directory, name = tree.at(node)
        raw = host_statx(directory, name, AT_SYMLINK_NOFOLLOW, request.arg[3])
    st = unpack_from(fuse.Statx, raw)
    nlink = 0 if node.dropped else 1 if node.merged else st.nlink + (node.index.beside if node.index is not None else 0)
    blocks = st.blocks if node.data is None else blocks_of_data(tree, node, st.size, st.blksize)
    st = st._replace(ino=node.ino, nlink=nlink, blocks=blocks)
    return mount.session.statx(request.unique, valid, mount.statx(node, st))


def _valid(mount: Mount, request: Request, node: Node) -> Validity:
    """For how long the kernel may keep what it is told next, in seconds."""
    if node.lingers and node.mappers == 1 and not _is_mapped(mount.tree, node):
        node.lingers = False
        node.mappers = 0
    return UNTIL_ASKED if node.mappers or request.nodeid != node.id else mount.forever


def _is_mapped(tree: Tree, node: Node) -> bool:
    """Whether somebody may still store to a file in the upper that he has closed.

    A shared mapping keeps the file below open for writing, and then there is no read lease to be had (fcntl(2),
    F_SETLEASE; fs/locks.c, check_conflicting_open). Where there are no leases at all it is taken to be mapped.
    """
    try:
        fd = tree.open(node, os.O_RDONLY)
    except OSError:
        return True
    try:
        identity.act_as(os.fstat(fd).st_uid, 0)  # leases are for a file's owner
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        return False
    except OSError:
        return True
    finally:
        os.close(fd)  # with which the lease ends


def setattr_(mount: Mount, request: Request) -> Reply:
    """SETATTR: size, owner, mode, times, in the order in which none undoes another."""
    valid, fh, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, uid, gid = request.arg[:13]
    tree = mount.tree
    node = tree.node(request.nodeid)
    if not valid & _CHANGES:
        call = caller.glance(request.pid)
        if request.uid:
            _must_be_allowed_to_drop_privileges(tree, node, request, call)
        elif call.is_seen and _writes(node, call) and caller.has_capability(request.pid, "fsetid", unseen=False):
            return getattr_(mount, request)  # a write that leaves the bits: it was for a capability, which has gone
    if valid & fuse.FATTR_MODE and stat.S_ISLNK(node.mode):  # older kernels pass it on, and chmod(2) would follow
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    identity.become_root()
    if protection_of(tree, node):
        refuse(tree, node, _forbidding(valid))
    sized = bool(valid & fuse.FATTR_SIZE)
    cut = sized and node.layer != UPPER and size < tree.stat(node).st_size
    copy_up(tree, node, size if sized else None, data=sized)
    if sized:
        _truncate(mount, node, fh if valid & fuse.FATTR_FH else None, size, cut=cut)
    with changing(node) as filling:
        # Nothing at all: chown(2) that names nobody, or a passthrough write that has to take setuid bits away (the
        # kernel leaves the new mode out, for HANDLE_KILLPRIV_V2). Here, too, a chown takes them and capabilities
        # (chown_common).
        if valid & (fuse.FATTR_UID | fuse.FATTR_GID) or not valid & _CHANGES:
            if request.uid:  # root is taken to have CAP_FSETID, which leaves one kind of setgid bit
                drop_privileges(tree, node, request)
            tree.chown(node, uid if valid & fuse.FATTR_UID else -1, gid if valid & fuse.FATTR_GID else -1)
            if filling is not None:
                filling.capability = None
        if valid & fuse.FATTR_MODE:
            tree.chmod(node, stat.S_IMODE(mode))
        elif valid & fuse.FATTR_KILL_SUIDGID and not valid & (fuse.FATTR_UID | fuse.FATTR_GID):
            drop_privileges(tree, node, request)
            if filling is not None:
                filling.capability = None
        if valid & (fuse.FATTR_ATIME | fuse.FATTR_MTIME):
            times = [(0, UTIME_OMIT), (0, UTIME_OMIT)]
            if valid & fuse.FATTR_ATIME:
                times[0] = (0, UTIME_NOW) if valid & fuse.FATTR_ATIME_NOW else (atime, atime_ns)
            if valid & fuse.FATTR_MTIME:
                times[1] = (0, UTIME_NOW) if valid & fuse.FATTR_MTIME_NOW else (mtime, mtime_ns)
            directory, known = (-100, tree.path(node)) if node.anchor >= 0 else tree.at(node)
            utimensat(directory, known, times[0], times[1], follow=node.anchor >= 0)
            if filling is not None:
                _note_times(filling, times)
    tree.touched(node)
    return getattr_(mount, request)


def _forbidding(valid: int) -> int:
    """Which flags of a file forbid a change (fs/attr.c, may_setattr; fs/open.c, vfs_truncate, do_ftruncate)."""
    if valid & fuse.FATTR_SIZE:  # whoever has it open for writing may cut it, but not where it may only grow
        return protection.APPEND if valid & fuse.FATTR_FH else protection.BOTH
    if valid & (fuse.FATTR_MODE | fuse.FATTR_UID | fuse.FATTR_GID):
        return protection.BOTH
    if not valid & (fuse.FATTR_ATIME | fuse.FATTR_MTIME):
        return 0
    return protection.IMMUTABLE if valid & _TOUCH == _TOUCH else protection.BOTH


def _note_times(filling: Filling, times: list[tuple[int, int]]) -> None:
    for which, (seconds, rest) in enumerate(times):
        if rest != UTIME_OMIT:
            filling.times[which] = time.time_ns() if rest == UTIME_NOW else seconds * 10**9 + rest


def _truncate(mount: Mount, node: Node, fh: int | None, size: int, *, cut: bool) -> None:
    """Where the size stays, ftruncate(2) changes the times all the same, and truncate(2) does on some filesystems only.

    `cut`: the file had another size until it was copied up.
    """
    handle = mount.handles.get(fh) if fh is not None else None
    if handle is not None and handle.writes:
        os.ftruncate(handle.fd, size)
        return
    fd = mount.tree.open(node, os.O_WRONLY if cut else os.O_PATH)
    try:
        os.truncate(fd if cut else b"/proc/self/fd/%d" % fd, size)
    finally:
        os.close(fd)


def _must_be_allowed_to_drop_privileges(tree: Tree, node: Node, request: Request, call: caller.Call) -> None:
    """Whoever writes takes setuid bits away; by chown(2) only the owner does, and the request looks the same.

    EPERM for others (setattr_prepare, which the kernel does not ask here: fuse_setattr takes ATTR_MODE out before),
    but for those with CAP_FOWNER.
    """
    st = tree.stat(node)
    if not _bits_to_take(st, request) or request.uid == st.st_uid or _writes(node, call):
        return
    if not caller.has_capability(request.pid, "fowner", unseen=False):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def _writes(node: Node, call: caller.Call) -> bool:
    """Whether it may be a write from which a request comes that takes privileges away: somebody has the file open so.

    That it is not seen in a chown(2) is not enough: there are more numbers for that than we know.
    """
    return not call.is_chown and any(handle.writes for handle in node.handles or ())


def drop_privileges(tree: Tree, node: Node, request: Request) -> None:
    """Take away what a write must not leave: the setuid and setgid bits, file capabilities.

    FUSE_HANDLE_KILLPRIV_V2 leaves this to the server.
    """
    st = tree.stat(node)
    if not stat.S_ISREG(st.st_mode):
        return
    gone = _bits_to_take(st, request)
    if gone:
        tree.chmod(node, stat.S_IMODE(st.st_mode & ~gone))
    if node.xattrs is not None and _CAPABILITY not in node.xattrs:
        return
    try:
        os.removexattr(tree.path(node), tree.stored_xattr(node, _CAPABILITY), follow_symlinks=node.anchor >= 0)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise


def _bits_to_take(st: os.stat_result, request: Request) -> int:
    """The setuid and setgid bits that a change of this file by this caller takes away (setattr_should_drop_suidgid).

    The setgid bit of a file that its group may not execute is left to members of the group.
    """
    mode = st.st_mode
    if not stat.S_ISREG(mode):
        return 0
    gone = mode & stat.S_ISUID
    if mode & stat.S_ISGID and (mode & stat.S_IXGRP or st.st_gid not in (request.gid, *caller.groups_of(request.pid))):
        gone |= stat.S_ISGID
    return gone


# xattrs


def _sized(mount: Mount, request: Request, value: bytes) -> Reply:
    size = request.arg[0]
    if not size:
        return mount.session.xattr_size(request.unique, len(value))
    if len(value) > size:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
    return mount.session.data(request.unique, value)


def getxattr(mount: Mount, request: Request) -> Reply:
    """GETXATTR; overlayfs's own are not there."""
    node = mount.tree.node(request.nodeid)
    # File capabilities are asked for at the first write and at a chown of every file, ACLs and labels by `ls -l`: most
    # files have none, and one list answers for all. Of other names the layer says whether there can be such a one.
    if request.name.startswith(_USUAL) and request.name not in _USUAL:
        names = node.xattrs if node.xattrs is not None else _listed(mount, node)
        if request.name not in names:
            return mount.session.error(request.unique, errno.ENODATA)
    name = mount.tree.stored_xattr(node, request.name)
    value = os.getxattr(mount.tree.path(node), name, follow_symlinks=node.anchor >= 0)
    return _sized(mount, request, mount.xattr(request.name, value))


def _listed(mount: Mount, node: Node) -> frozenset[bytes]:
    names = os.listxattr(mount.tree.path(node), follow_symlinks=node.anchor >= 0)
    shown = (mount.tree.shown_xattr(node, os.fsencode(name)) for name in names)
    node.xattrs = frozenset(name for name in shown if name is not None and name not in mount.unlisted)
    return node.xattrs


def listxattr(mount: Mount, request: Request) -> Reply:
    """LISTXATTR; trusted ones are shown to whoever has CAP_SYS_ADMIN (xattr(7)).

    Root is taken to have it where that is not to be seen: what is not listed is missing in a copy, and nobody says so.
    """
    node = mount.tree.node(request.nodeid)
    names = sorted(_listed(mount, node))
    others = [name for name in names if not name.startswith(b"trusted.")]
    if len(others) < len(names) and not caller.has_capability(request.pid, "sys_admin", unseen=not request.uid):
        names = others
    return _sized(mount, request, b"".join(name + b"\0" for name in names))


def setxattr(mount: Mount, request: Request) -> Reply:
    """SETXATTR."""
    identity.become_root()
    tree = mount.tree
    node = tree.node(request.nodeid)
    refuse(tree, node)
    copy_up(tree, node)
    node.xattrs = None
    name, flags = tree.stored_xattr(node, request.name), request.arg[1]
    with changing(node) as filling:
        os.setxattr(tree.path(node), name, request.payload, flags, follow_symlinks=node.anchor >= 0)
        if filling is not None and name == _CAPABILITY:
            filling.capability = bytes(request.payload)
    if len(request.arg) > 2 and request.arg[2] & fuse.FUSE_SETXATTR_ACL_KILL_SGID:
        mode = tree.stat(node).st_mode
        if mode & stat.S_ISGID:
            tree.chmod(node, stat.S_IMODE(mode & ~stat.S_ISGID))
    tree.touched(node)
    return mount.session.empty(request.unique)


def removexattr(mount: Mount, request: Request) -> Reply:
    """REMOVEXATTR. For a capability it comes of a write or a chown(2), before its SETATTR, which may be refused."""
    tree = mount.tree
    node = tree.node(request.nodeid)
    if request.uid and request.name == _CAPABILITY:
        call = caller.glance(request.pid)
        if call.is_chown:
            _must_be_allowed_to_drop_privileges(tree, node, request, call)
    identity.become_root()
    refuse(tree, node)
    if node.layer != UPPER:  # that there is no such xattr is no reason to copy the file up
        os.getxattr(tree.path(node), tree.stored_xattr(node, request.name), follow_symlinks=node.anchor >= 0)
    copy_up(tree, node)
    node.xattrs = None
    name = tree.stored_xattr(node, request.name)
    with changing(node) as filling:
        taken = filling is not None and name == _CAPABILITY and filling.capability is not None
        try:
            os.removexattr(tree.path(node), name, follow_symlinks=node.anchor >= 0)
        except OSError as error:  # writing has taken it away before us, and was to put it back
            if not taken or error.errno != errno.ENODATA:
                raise
        if filling is not None and taken:
            filling.capability = None
    tree.touched(node)
    return mount.session.empty(request.unique)


def statfs(mount: Mount, request: Request) -> Reply:
    """STATFS: the upper's, or the topmost layer's."""
    tree = mount.tree
    st = os.fstatvfs(tree.layers[tree.root.layer].root)
    sizes = st.f_blocks, st.f_bfree, st.f_bavail, st.f_files, st.f_ffree, st.f_bsize, st.f_namemax, st.f_frsize
    return mount.session.statfs(request.unique, fuse.Kstatfs(*sizes))
