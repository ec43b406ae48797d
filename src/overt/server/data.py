"""Open files and their data.

Where the kernel grants passthrough, reads, writes and mappings go straight to the file in its layer: the server
registers that file once (a *backing*) for all opens of an inode, and sees no data again. What follows from that:

One backing for all open files of an inode. A file that is open for reading on a lower layer when it is copied up keeps
that one (as mappings do in overlayfs); whoever opens it from then on has to see the upper file. So the file gets a new
number, and the open fails with ESTALE, at which the kernel looks the name up again and opens what it finds
(do_filp_open). The old number stays for those who have the file open. They can still open it anew without a name
(/proc/self/fd): for reading, which is then done here; for writing there is no way but ESTALE.

The kernel opens the backing with the caller's flags, O_SYNC too, and that would flush the upper of a volatile mount.
There FOPEN_DIRECT_IO, which beats FOPEN_PASSTHROUGH for read and write, brings these writes here.

The credential at registration counts: that of the user who opens the file first, without CAP_SYS_RESOURCE, so quotas
and reserved blocks hold. It leaves setuid bits: a write that has to take them away announces itself by an empty SETATTR
(server/attributes.py).

The kernel does not know the times, and the room, that a mapping's writes take: attributes of a file that is open for
reading and writing, and so can be mapped, are not cached, and when it is closed the kernel is told to forget them if
they are not the ones it was given. A mapping outlives the descriptor, and keeps the backing's file but not FUSE's: so
the attributes are not cached afterwards either, until a look at the file below says that nobody maps it
(server/attributes.py). What write(2) changes the kernel knows.

Neither fcntl(2), which can take O_APPEND away, nor a mapping asks whether a file is append-only. So who opens one to
append writes here, and can share no mapping (FOPEN_DIRECT_IO; the kernel is not told FUSE_DIRECT_IO_ALLOW_MMAP). If
he could map it and it has a backing, which would be what he maps, it gets a new number, which has none. The kernel has
two inodes for one growing file then, each with a size of its own, and appends at the one it knows: so what is written
with O_APPEND goes to the end that the file has.

Without passthrough the kernel caches pages, writes through, and the server reads and writes. Each open file has a
descriptor of its own here in both cases: it is what makes each be told of an error by fsync, once.
"""

import errno
import fcntl
import os
import stat
import threading
import time

from overt.fuse import notify
from overt.fuse.request import Request
from overt.host.files import FALLOC_FL_KEEP_SIZE
from overt.host.files import fallocate as host_fallocate
from overt.overlay import protection
from overt.server import caller, identity
from overt.server.attributes import drop_privileges
from overt.server.mount import UNTIL_ASKED, Handle, Mount
from overt.tree import making
from overt.tree.copyup import copy_up
from overt.tree.flags import protection_of, refuse
from overt.tree.layer import UPPER
from overt.tree.node import Node
from overt.wire import fuse
from overt.wire.record import pack

Reply = bytes | memoryview | None

# The kernel does these itself, in front of us; a descriptor that had them would do them twice.
_NOT_OURS = os.O_APPEND | os.O_DIRECT | os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_TRUNC
_SYNC = os.O_SYNC | os.O_DSYNC
_SOON = 1.0
"""seconds in which the kernel opens again what was refused with ESTALE"""
_PILE = 32
"""how many released files may wait to be closed"""


class _Scratch(threading.local):
    """Room of a thread's own for what it reads."""

    def __init__(self) -> None:
        self.room = memoryview(bytearray(1 << 20))


_scratch = _Scratch()


class Backing:
    """A file registered for passthrough, used by so many open files."""

    __slots__ = ("closed", "id", "layer", "users")

    def __init__(self, number: int, layer: int) -> None:
        self.id = number
        self.layer = layer
        self.users = 0
        self.closed = False


def open_(mount: Mount, request: Request) -> Reply:
    """OPEN."""
    flags = request.arg[0]
    tree = mount.tree
    node = tree.node(request.nodeid)
    if not flags and (request.nodeid != node.id or _has_moved(node)) and _asks_for_flags(request):
        handle = _entered(mount, node, tree.open(node, os.O_RDONLY), 0)
        return mount.session.opened(request.unique, handle.fh, fuse.FOPEN_NOFLUSH)
    writes = flags & os.O_ACCMODE != os.O_RDONLY
    cut = flags & os.O_TRUNC
    appends = False
    if (writes or cut) and protection_of(tree, node):
        refuse(tree, node, protection.BOTH if cut or not flags & os.O_APPEND else protection.IMMUTABLE)
        appends = True
    if (writes or cut) and (node.layer != UPPER or node.data is not None):
        identity.become_root()
        copy_up(tree, node, 0 if cut else None, data=True)
    maps = appends and _would_map(node, flags)
    if maps or _has_moved(node):
        tree.renumber(node)
        node.backing = None
    if maps:
        _split(node)
    below = None
    if request.nodeid != node.id:
        below = _below(node, request)
    elif node.refused:
        node.refused.pop(request.pid, None)  # whoever was sent to look the name up has done so
    fd = tree.open(node, _ours(mount, flags) | cut)
    if request.arg[1] & fuse.FUSE_OPEN_KILL_SUIDGID:
        try:
            drop_privileges(tree, node, request)
        except OSError:
            os.close(fd)
            raise
    handle = _opened(mount, request, node, fd, writes=writes, below=below, appends=appends)
    return mount.session.opened(request.unique, handle.fh, *_how(handle))


def _has_moved(node: Node) -> bool:
    """Whether a file was copied up since it was opened as it is open."""
    return node.backing is not None and node.backing.layer != (node.data or node).layer


def _would_map(node: Node, flags: int) -> bool:
    """Whether who opens a file so could write to a backing by a mapping."""
    return node.backing is not None and node.backing.users > 0 and flags & os.O_ACCMODE == os.O_RDWR


def _split(node: Node) -> None:
    """Two numbers stand for one file that grows: what is written under the old one changes what the new one shows."""
    for handle in node.handles or ():
        if handle.writes and not handle.maps:
            handle.maps = True
            node.mappers += 1


def _asks_for_flags(request: Request) -> bool:
    """Whether the kernel opens for itself, to ask for flags (server/flags.py): ESTALE would be what its caller gets.

    It does so without O_LARGEFILE, as a program of 32 bits may.
    """
    return caller.glance(request.pid).is_about_flags


def _below(node: Node, request: Request) -> Backing | None:
    """The backing in use under a number that a file had before it got its own; ESTALE to look it up again."""
    flags = request.arg[0]
    for handle in node.handles or ():
        if handle.backing is not None and handle.backing is not node.backing:
            break
    else:
        return None
    if node.refused is None:
        node.refused = {}
    now = time.monotonic()
    again = request.pid and now - node.refused.pop(request.pid, -_SOON) < _SOON
    if again and flags & os.O_ACCMODE == os.O_RDONLY and not flags & os.O_TRUNC:
        backing: Backing = handle.backing  # and no look-up between: there is no name on this way
        return backing
    node.refused[request.pid] = now
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def create(mount: Mount, request: Request) -> Reply:
    """CREATE: of a name that the kernel takes for missing; one that is there after all is opened."""
    flags, mode, umask = request.arg[:3]
    mount.become(request, umask)
    tree = mount.tree
    node, st, fd = making.create(tree, tree.node(request.nodeid), request.name, _ours(mount, flags), mode)
    return _created(mount, request, node, st, fd)


def tmpfile(mount: Mount, request: Request) -> Reply:
    """TMPFILE: open(2) with O_TMPFILE."""
    flags, mode, umask = request.arg[:3]
    mount.become(request, umask)
    tree = mount.tree
    keep = os.O_EXCL & flags
    node, st, fd = making.tmpfile(tree, tree.node(request.nodeid), _ours(mount, flags) | keep, mode)
    return _created(mount, request, node, st, fd)


def _created(mount: Mount, request: Request, node: Node, st: os.stat_result, fd: int) -> Reply:
    flags = request.arg[0]
    handle = _opened(mount, request, node, fd, writes=flags & os.O_ACCMODE != os.O_RDONLY)
    node.lookups += 1
    valid = UNTIL_ASKED if node.mappers else mount.forever
    attr = mount.attr(node, st)
    return mount.session.created(request.unique, node.id, 0, valid, attr, handle.fh, *_how(handle))


def _ours(mount: Mount, flags: int) -> int:
    """The flags that the server's own descriptor is opened with."""
    return flags & ~(_NOT_OURS | _SYNC if mount.volatile else _NOT_OURS)


def _opened(
    mount: Mount, request: Request, node: Node, fd: int, *, writes: bool, below: Backing | None = None,
    appends: bool = False,
) -> Handle:  # fmt: skip
    flags = request.arg[0]
    if node.backing is None and below is None and mount.passthrough and not appends:
        try:
            node.backing = _register(mount, request, node, fd)
        except OSError:
            os.close(fd)
            raise
    handle = _entered(mount, node, fd, _ours(mount, flags), writes=writes)
    handle.appends = appends
    handle.direct = appends
    backing = below or node.backing
    if backing is not None and not (appends and backing.users == 0):  # all have it, or none
        backing.users += 1
        handle.backing = backing
        handle.direct |= below is not None or (mount.volatile and bool(flags & _SYNC))
        handle.maps = flags & os.O_ACCMODE == os.O_RDWR
        node.mappers += handle.maps
        if handle.maps and node.mappers == 1 and node.lookups:  # what the kernel was told before was for ever
            mount.send(notify.inval_inode(node.id, -1, 0))
    return handle


def _entered(mount: Mount, node: Node, fd: int, flags: int, *, writes: bool = False) -> Handle:
    handle = mount.new_handle(node, fd, flags, writes=writes)
    if node.handles is None:
        node.handles = {handle}
    else:
        node.handles.add(handle)
    return handle


def _register(mount: Mount, request: Request, node: Node, fd: int) -> Backing | None:
    """Register a file; None where the kernel does not grant it (a layer that is stacked itself, say).

    Raises OSError for what is no file: somebody has changed the layer behind our back.
    """
    identity.act_as(request.uid, request.gid)
    try:
        return Backing(register(mount.fd, fd), (node.data or node).layer)
    except OSError as error:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise
        mount.passthrough = False  # all or none: an inode cannot be opened both ways at once
        mount.events.say("no passthrough", mount=mount.target, why=str(error))
        return None


def register(fuse_fd: int, fd: int) -> int:
    """FUSE_DEV_IOC_BACKING_OPEN: the backing id of an open file; OSError (EPERM, ELOOP, ...) where it is not
    granted.
    """
    # A bytearray: given bytes, ioctl would return the buffer, and the id would be lost.
    return int(fcntl.ioctl(fuse_fd, fuse.FUSE_DEV_IOC_BACKING_OPEN, bytearray(pack(fuse.BackingMap(fd, 0)))))


def unregister(fuse_fd: int, backing: int) -> None:
    """FUSE_DEV_IOC_BACKING_CLOSE."""
    fcntl.ioctl(fuse_fd, fuse.FUSE_DEV_IOC_BACKING_CLOSE, backing.to_bytes(4, "little"))


def _how(handle: Handle) -> tuple[int, int]:
    """(open flags, backing id) of the reply."""
    direct = fuse.FOPEN_DIRECT_IO if handle.direct else 0
    if handle.backing is None:
        return fuse.FOPEN_NOFLUSH | fuse.FOPEN_KEEP_CACHE | direct, 0
    return fuse.FOPEN_NOFLUSH | fuse.FOPEN_PASSTHROUGH | direct, handle.backing.id


def release(mount: Mount, request: Request) -> Reply:
    """RELEASE: the last descriptor of an open file is gone."""
    handle = mount.handles.pop(request.arg[0], None)
    if handle is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    node = handle.node
    if node.handles is not None:
        node.handles.discard(handle)
    if handle.maps:
        if handle.backing is not None and not node.lingers:
            node.lingers = True  # it goes on counting
        else:
            node.mappers -= 1
        if _mtime(handle.fd) != node.written:
            mount.send(notify.inval_inode(node.id, -1, 0))
    if handle.backing is not None:
        handle.backing.users -= 1
    mount.released.append(handle)
    if len(mount.released) > _PILE:
        tidy(mount)
    return mount.session.empty(request.unique)


def _mtime(fd: int) -> int:
    """In nanoseconds; -1 where the upper has shut down and does not say."""
    try:
        return os.fstat(fd).st_mtime_ns
    except OSError:
        return -1


def tidy(mount: Mount) -> None:
    """Close what was released: when no request waits, or the pile is high. An open that comes first uses it again."""
    while mount.released:
        handle = mount.released.pop()
        backing = handle.backing
        if backing is not None and not backing.users and not backing.closed:
            backing.closed = True
            if handle.node.backing is backing:
                handle.node.backing = None
            unregister(mount.fd, backing.id)
        try:
            os.close(handle.fd)
        except OSError as error:  # of a layer that is a network filesystem, say; the descriptor is gone all the same
            mount.events.say("close failed", mount=mount.target, why=str(error))


# Data that passes through the server


def read(mount: Mount, request: Request) -> Reply:
    """READ: at once what the page cache has, the rest by a worker."""
    fh, offset, size = request.arg[:3]
    fd = mount.open_handle(fh).fd
    unique = request.unique
    room = _scratch.room[:size]
    try:
        done = os.preadv(fd, [room], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise
        done = -1
    if done == size:
        mount.send(mount.session.data_header(unique, done), room[:done])
        return None
    mount.submit(request, lambda: mount.session.data(unique, os.pread(fd, size, offset)))
    return None


def write(mount: Mount, request: Request) -> Reply:
    """WRITE."""
    fh, offset, size, flags, _, how = request.arg
    handle = mount.open_handle(fh)
    at_end = 0
    if handle.appends:
        if offset < os.fstat(handle.fd).st_size and not (how & os.O_APPEND and handle.node.stale):
            refuse(mount.tree, handle.node, protection.APPEND)
        elif how & os.O_APPEND:
            at_end = os.RWF_APPEND
    if flags & fuse.FUSE_WRITE_KILL_SUIDGID:
        drop_privileges(mount.tree, handle.node, request)
    identity.act_as(request.uid, request.gid)
    done = os.pwritev(handle.fd, [request.payload], offset, at_end)
    while done < size:
        try:
            done += os.pwritev(handle.fd, [request.payload[done:]], offset + done, at_end)
        except OSError:
            break  # what was written counts; the next write meets the error
    if flags & fuse.FUSE_WRITE_CACHE:
        mount.written_back = True
    return mount.session.written(request.unique, done)


def lseek(mount: Mount, request: Request) -> Reply:
    """LSEEK: SEEK_DATA and SEEK_HOLE."""
    fh, offset, whence = request.arg[:3]
    handle = mount.open_handle(fh)
    if handle.backing is None and any(other.writes for other in handle.node.handles or ()):
        # Without passthrough a mapping's writes are in the kernel's pages, which it does not write back before it asks
        # (fuse_lseek): what looks like a hole here may hold data there. All of it is data then, as SEEK_DATA may say.
        return mount.session.lseek(request.unique, _all_data(os.fstat(handle.fd).st_size, offset, whence))
    return mount.session.lseek(request.unique, os.lseek(handle.fd, offset, whence))


def _all_data(size: int, offset: int, whence: int) -> int:
    """SEEK_DATA or SEEK_HOLE in a file of `size` bytes without holes; ENXIO at or beyond its end."""
    if not 0 <= offset < size:
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
    return offset if whence == os.SEEK_DATA else size


def fallocate(mount: Mount, request: Request) -> Reply:
    """FALLOCATE."""
    fh, offset, length, mode = request.arg[:4]
    handle = mount.open_handle(fh)
    fd = handle.fd
    only_room = not mode & ~FALLOC_FL_KEEP_SIZE
    refuse(mount.tree, handle.node, protection.IMMUTABLE if only_room else protection.BOTH)
    if request.uid:  # root is taken to have CAP_FSETID: these requests do not say
        drop_privileges(mount.tree, handle.node, request)

    def work() -> bytes:
        with identity.of_worker(request.uid, request.gid):
            host_fallocate(fd, mode, offset, length)
        return mount.session.empty(request.unique)

    mount.submit(request, work)
    return None


def copy_file_range(mount: Mount, request: Request) -> Reply:
    """COPY_FILE_RANGE: by the layers' filesystem, which may share the blocks."""
    fh_in, offset_in, _, fh_out, offset_out, length = request.arg[:6]
    into = mount.open_handle(fh_out)
    source, target = mount.open_handle(fh_in), into.fd
    refuse(mount.tree, into.node, protection.BOTH if into.appends else protection.IMMUTABLE)
    if request.uid:  # root is taken to have CAP_FSETID: these requests do not say
        drop_privileges(mount.tree, into.node, request)

    def work() -> bytes:
        quiet = _leaving_access_time(source.fd)
        try:
            with identity.of_worker(request.uid, request.gid):
                copied = os.copy_file_range(quiet, target, min(length, 1 << 30), offset_in, offset_out)
        finally:
            if quiet != source.fd:
                os.close(quiet)
        return mount.session.written(request.unique, copied)

    mount.submit(request, work)
    return None


def _leaving_access_time(fd: int) -> int:
    """A descriptor of the same file, reading which changes no access time, as overlayfs's own of a layer's file.

    `fd` itself where there can be no other one (another user's file without CAP_FOWNER; no descriptors left): a time is
    no reason to fail.
    """
    try:
        return os.open(b"/proc/self/fd/%d" % fd, os.O_RDONLY | os.O_NOATIME | os.O_CLOEXEC)
    except OSError:
        return fd
