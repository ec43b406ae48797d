"""Reaching the cursor of a mount whose superblock is read-only (`mount -o remount,ro`, past overt's helper).

The kernel asks a read-only superblock nothing: syncfs(2) only compares the caller's cursor with the superblock's
(fs/sync.c). So an error has to be on that cursor before the next syncfs(2) looks; and what puts it there
(server/poison.py) opens a file for writing, which a read-only superblock refuses. Therefore it becomes writable for the
moment that this takes, a millisecond or two, in which the server itself refuses every change with EROFS.

    the remount      mount(2) has s_umount, and waits for its SYNCFS. It cannot be told: the answer is thrown away
                     (fuse_reconfigure). It cannot be poisoned now: opening for writing is refused already
                     (s_readonly_remount). So a thread of ours asks for a writable superblock, and waits for s_umount;
                     when it stands in line mount(2) is answered. Any syncfs(2) after the remount comes behind it: the
                     thread is a real-time one, to which that lock is handed over. From another a reader may steal it
                     (kernel/locking/rwsem.c, RWSEM_FLAG_HANDOFF).
    an error later   somebody looks at the upper every few milliseconds while such a mount is there
                     (server/remounted.py).

Whoever remounts it meanwhile has the last word: the kernel asks us to flush what is writable when it is remounted.
Only a remount in the microseconds in which we find out that it is writable for our sake is undone.

The tempting wrong way is to keep the hidden file open for writing, for then: such a file makes the remount fail
(EBUSY).
"""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator

from overt.fuse.request import Request
from overt.host import mounts
from overt.server import caller
from overt.server.mount import Mount
from overt.wire import fuse

_IN_LINE = 1.0
"""seconds for a thread to stand in line for s_umount"""
_CLOSING = 10.0
"""seconds for files that somebody tries to open for writing to be refused"""
_PAUSE = 1e-3

_CHANGES = (
    fuse.FUSE_SETATTR, fuse.FUSE_SYMLINK, fuse.FUSE_MKNOD, fuse.FUSE_MKDIR, fuse.FUSE_UNLINK, fuse.FUSE_RMDIR,
    fuse.FUSE_RENAME, fuse.FUSE_RENAME2, fuse.FUSE_LINK, fuse.FUSE_SETXATTR, fuse.FUSE_REMOVEXATTR, fuse.FUSE_CREATE,
    fuse.FUSE_TMPFILE, fuse.FUSE_WRITE, fuse.FUSE_FALLOCATE, fuse.FUSE_COPY_FILE_RANGE,
)  # fmt: skip


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


def is_read_only(mount: Mount) -> bool:
    """Whether its superblock is read-only. OSError as `place` raises."""
    with place(mount) as directory:
        return bool(os.fstatvfs(directory).f_flag & os.ST_RDONLY)


@contextlib.contextmanager
def writable(mount: Mount, directory: int, *, wait: bool) -> Iterator[None]:
    """While the body runs, files can be opened for writing through `directory`, and by nobody but us.

    On the way out the superblock is made read-only again, by a thread for which nobody waits: it has to wait for those
    who are in syncfs(2). OSError as fsconfig(2) raises, and EBUSY if that is still under way from the last time; `wait`
    for it unless it is whoever remounts who keeps it.
    """
    if not mount.reopening.acquire(timeout=_CLOSING if wait else 0):
        raise OSError(errno.EBUSY, "the superblock is still being made read-only again")
    if mount.account is None or mount.account.owed() is None:  # the last time has seen to it
        mount.reopening.release()
        yield
        return
    again = os.dup(directory)
    closer = threading.Thread(target=_close, args=(mount, again), daemon=True)
    try:
        mount.overtaken = False
        handlers, mount.handlers = mount.handlers, _refusing(mount)
        try:
            _open(mount, directory)
        except BaseException:
            mount.handlers = handlers
            raise
    except BaseException:
        os.close(again)
        mount.reopening.release()
        raise
    try:
        yield
    finally:
        closer.start()


def _open(mount: Mount, directory: int) -> None:
    failed: list[OSError] = []

    def ask() -> None:
        try:
            with contextlib.suppress(OSError):  # without CAP_SYS_NICE it is a matter of microseconds
                os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
            mount.opener = threading.get_native_id()
            mounts.reconfigure(directory, "rw")
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    deadline = time.monotonic() + _IN_LINE
    while thread.is_alive() and not caller.of(thread.native_id or 0).is_remount and time.monotonic() < deadline:
        time.sleep(_PAUSE / 10)
    mount.line.stand()
    thread.join()
    mount.opener = 0
    mount.line.leave()
    if failed:
        raise failed[0]
    mount.reopened = not mount.overtaken


def _close(mount: Mount, directory: int) -> None:
    """Make the superblock read-only again, unless somebody else has remounted it since."""
    mount.closer = threading.get_native_id()
    mount.line.stand()
    deadline = time.monotonic() + _CLOSING
    try:
        while not mount.overtaken:
            try:
                mounts.reconfigure(directory, "ro")
                break
            except OSError as error:
                # EBUSY: somebody is on his way to a refusal
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    mount.events.say("not read-only again, and refuses changes", mount=mount.target, why=str(error))
                    return
                time.sleep(_PAUSE)
    finally:
        mount.closer = 0
        mount.line.leave()
        os.close(directory)
        mount.reopening.release()


def leave(mount: Mount) -> None:
    """It is being made read-only again, and the kernel refuses changes by now: we need not, and soon must not."""
    mount.reopened = False
    mount.handlers = mount.served


def overtake(mount: Mount) -> None:
    """Somebody else remounts it: if it is writable for our sake, it is as he says from now on."""
    if mount.reopened:
        was_writable(mount)


def was_writable(mount: Mount) -> None:
    """It is so without us: the kernel has asked to flush what was to be made writable, or somebody remounts that."""
    mount.overtaken = True
    leave(mount)


def _refusing(mount: Mount) -> list[Callable[[Mount, Request], bytes | memoryview | None]]:
    table = list(mount.served)
    for opcode in _CHANGES:
        table[opcode] = _refuse
    table[fuse.FUSE_OPEN] = _open_to_read
    return table


def _refuse(mount: Mount, request: Request) -> bytes:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def _open_to_read(mount: Mount, request: Request) -> bytes | memoryview | None:
    if request.arg[0] & (os.O_ACCMODE | os.O_TRUNC):
        return _refuse(mount, request)
    return mount.served[fuse.FUSE_OPEN](mount, request)
