"""Setting the error cursor of a mount's own superblock.

The kernel tells every open file of a filesystem of a writeback error exactly once, by the errseq of the superblock
(fs/sync.c, syncfs). A FUSE server can put an error there: it maps a page of a file of its own mount, dirties it, and
answers the WRITE that msync(2) causes with that error (mm/filemap.c, mapping_set_error). Done while a SYNCFS request is
held back, the very call that found the error is told, and everything else is the kernel's errseq.

The file is *hidden*: it has a number and no name. It is opened by handle, through somebody's descriptor of this
mount, so that nothing of ours keeps the mount busy before or after. Whose descriptor, in this order:

1. the caller's own, the one it called syncfs with: there always is one, in whatever namespace;
2. the place where the server mounted it: the caller's mount may be read-only where this one is not, or its thread may
   not be visible from here;
3. a clone of the caller's mount with the read-only flag taken off, made inside the caller's mount namespace;
4. a clone of our own place likewise. If that is refused, the superblock is read-only (server/reopening.py).

Not by one more mount of the same block device, which would need neither caller nor place: the kernel gives it the same
superblock, but waits for its s_umount first, which whoever is in syncfs(2) holds.

Each of these may hang, for as long as it likes: what the caller has in the place of its descriptor by now may be of any
filesystem, and is asked for its st_dev; the path to the place, or what was mounted over it, likewise; and the third
opens somebody's file. So all this runs on a thread of its own, for which nobody waits for ever (server/syncing.py); the
thread that handles requests answers what it causes.

A privileged program could forge the handle. OPEN of the hidden file is granted to threads of ours that are
about to open it, nobody else.
"""

import contextlib
import errno
import os
import stat
import struct
import threading
from collections.abc import Iterator

from overt.fuse.attr import validity
from overt.fuse.request import Request
from overt.host import memory, mounts, process
from overt.host.files import Handle, open_by_handle
from overt.server.caller import Call
from overt.server.mount import Mount
from overt.wire import fuse
from overt.wire.record import pack

_PAGE = 4096
_INO64_GEN = 0x81  # FILEID_INO64_GEN, <linux/exportfs.h>
_NEVER = validity(0, 0)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC  # not O_PATH: open_by_handle_at refuses that


def new_number() -> int:
    """A number for a mount's hidden file that no node has."""
    return 1 << 62 | int.from_bytes(os.urandom(8)) >> 3


@contextlib.contextmanager
def place(mount: Mount) -> Iterator[int]:
    """A directory of the mount that nobody else's flags make read-only: of a clone of the place where it is.

    OSError: ENOENT where the server has no place of its own, and what open_tree(2) raises.
    """
    if not mount.placed:
        raise OSError(errno.ENOENT, "the mount is in no namespace of ours")
    clone = mounts.clone(mount.target)
    try:
        mounts.set_attributes(clone, remove=mounts.MOUNT_ATTR_RDONLY)
        directory = os.open(f"/proc/self/fd/{clone}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(clone)
    try:
        if os.fstat(directory).st_dev != mount.device:
            raise OSError(errno.EXDEV, "something else is mounted over it")
        yield directory
    finally:
        os.close(directory)


def poison(mount: Mount, code: int, call: Call) -> None:
    """Record errno `code` on the mount's superblock; raise OSError if no way there was found."""
    problems = []
    mount.refuses = False
    for route in (_callers, _ours, _unlocked):
        try:
            fd = route(mount, call)
            try:
                _write(mount, fd, code)
                return
            finally:
                os.close(fd)
        except OSError as error:
            problems.append(error.strerror or str(error))
    try:
        _through_ours(mount, code)
        return
    except OSError as error:
        problems.append(error.strerror or str(error))
    raise OSError(errno.EIO, "; ".join(problems))


def _through_ours(mount: Mount, code: int) -> None:
    with place(mount) as directory:
        try:
            _write(mount, directory, code)
        except OSError as error:
            mount.refuses = error.errno == errno.EROFS
            raise


def _write(mount: Mount, through: int, code: int) -> None:
    mount.poison = code
    file = open_hidden(mount, through)
    try:
        memory.write_through_mapping(file, _PAGE)
    except OSError as error:
        if error.errno != code:
            raise
    else:
        raise OSError(errno.EIO, "the kernel did not take the error")
    finally:
        os.close(file)


def open_hidden(mount: Mount, through: int) -> int:
    """The hidden file, opened for writing through some descriptor of the mount. OSError: EROFS if it is read-only."""
    number = mount.hidden
    handle = Handle(_INO64_GEN, struct.pack("=III", number >> 32, number & 0xFFFFFFFF, 0))
    thread = threading.get_native_id()
    mount.openers.add(thread)
    try:
        return open_by_handle(through, handle, os.O_RDWR)
    finally:
        mount.openers.discard(thread)


def _is_ours(mount: Mount, fd: int) -> int:
    try:
        if os.fstat(fd).st_dev != mount.device:
            raise OSError(errno.EXDEV, "the descriptor is not of this mount")
    except OSError:  # an upper that has shut down does not even say what its files are
        os.close(fd)
        raise
    return fd


def _callers(mount: Mount, call: Call) -> int:
    if not call.is_syncfs:
        raise OSError(errno.ESRCH, "the caller cannot be seen")
    thread = process.open_thread(call.tid)
    try:
        return _is_ours(mount, process.borrow_fd(thread, call.argument))
    finally:
        os.close(thread)


def _ours(mount: Mount, _: Call) -> int:
    if not mount.placed:
        raise OSError(errno.ENOENT, "the mount is in no namespace of ours")
    return _is_ours(mount, os.open(mount.target, _DIRECTORY))


def _unlocked(mount: Mount, call: Call) -> int:
    """A namespace is entered by a thread that ends afterwards: there is no way back for the one that went.

    Only through a directory or a regular file: what opening a FIFO or a device sets off is not for us to set off.
    """
    theirs = _callers(mount, call)
    mode = os.fstat(theirs).st_mode
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        os.close(theirs)
        raise OSError(errno.EROFS, "the caller's mount is read-only, and its descriptor is of a special file")
    result: list[int | OSError] = []

    def enter() -> None:
        try:
            process.unshare(process.CLONE_FS)
            thread = process.open_thread(call.tid)
            try:
                process.setns(thread, process.CLONE_NEWNS)
            finally:
                os.close(thread)
            clone = mounts.clone(b"", dir_fd=theirs)
            try:
                mounts.set_attributes(clone, remove=mounts.MOUNT_ATTR_RDONLY)
            except OSError:
                os.close(clone)
                raise
            result.append(clone)
        except OSError as error:
            result.append(error)

    worker = threading.Thread(target=enter)
    try:
        process.start(worker)
        worker.join()
    finally:
        os.close(theirs)
    clone = result[0]
    if isinstance(clone, OSError):
        raise clone
    try:
        return _is_ours(mount, os.open(f"/proc/self/fd/{clone}", os.O_RDONLY | os.O_CLOEXEC))
    finally:
        os.close(clone)


# The hidden file, as the kernel sees it


def serve_hidden(mount: Mount, request: Request) -> bytes | None:
    """Answer a request about the hidden file."""
    session, unique, opcode = mount.session, request.unique, request.opcode
    if opcode == fuse.FUSE_FORGET:
        return None
    if opcode == fuse.FUSE_LOOKUP and request.name == b".":
        return session.entry(unique, mount.hidden, 0, _NEVER, _attributes(mount))
    if opcode == fuse.FUSE_GETATTR or opcode == fuse.FUSE_SETATTR:
        return session.attr(unique, _NEVER, _attributes(mount))
    if opcode == fuse.FUSE_OPEN and request.pid in mount.openers:
        return session.opened(unique, 0, fuse.FOPEN_NOFLUSH | fuse.FOPEN_KEEP_CACHE)
    if opcode == fuse.FUSE_READ:
        return session.data(unique, bytes(request.arg[2]))
    if opcode == fuse.FUSE_WRITE:
        return session.error(unique, mount.poison)
    if opcode in (fuse.FUSE_FSYNC, fuse.FUSE_FLUSH, fuse.FUSE_RELEASE):
        return session.empty(unique)
    return session.error(unique, errno.EACCES)


def _attributes(mount: Mount) -> bytes:
    mode = stat.S_IFREG | stat.S_IRUSR | stat.S_IWUSR
    return pack(fuse.Attr(mount.hidden, _PAGE, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, _PAGE, 0))
