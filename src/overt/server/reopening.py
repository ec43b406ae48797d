"""Reaching the cursor of a mount whose superblock becomes read-only (`mount -o remount,ro`, past overt's helper).

The kernel asks a read-only superblock nothing: syncfs(2) only compares the caller's cursor with the superblock's
(fs/sync.c). So an error that is owed has to be on that cursor before the next syncfs(2) looks; and what puts it there
(server/poison.py) opens a file for writing, which a read-only superblock refuses. Therefore it becomes writable for the
moment that this takes, a millisecond or two.

mount(2) has s_umount, and waits for its SYNCFS. It cannot be told: the answer is thrown away (fuse_reconfigure). It
cannot be poisoned now: opening for writing is refused already (s_readonly_remount). So a thread of ours asks for a
writable superblock, and waits for s_umount; when it stands in line mount(2) is answered. Any syncfs(2) after the
remount comes behind it: the thread is a real-time one, to which that lock is handed over. From another a reader may
steal it (kernel/locking/rwsem.c, RWSEM_FLAG_HANDOFF).

From before it asks until the kernel has the superblock read-only again the server itself refuses every change, for as
long as that takes. It takes long while somebody keeps trying to open files for writing, for each attempt makes the
kernel say EBUSY until it is refused. To hold such an attempt back would not help: the kernel counts it before we hear
of it.

Only somebody else's remount to writable ends that earlier. The kernel asks us to flush what is writable when it is
remounted, whichever way; s_umount is held meanwhile, so nothing changes while we look whether a file can be opened for
writing. If so, it is kept open until our thread has noticed: what it may be asking for already then fails.

The tempting wrong way is to keep the hidden file open for writing, for the next error: such a file makes the remount
fail (EBUSY).
"""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable

from overt.fuse.request import Request
from overt.host import mounts
from overt.server import caller, flags
from overt.server.mount import Mount, Reopening
from overt.server.poison import open_hidden, place
from overt.wire import fuse

_IN_LINE = 1.0
"""seconds for a thread to stand in line for s_umount"""
_PAUSE, _LONGEST = 1e-3, 0.25
"""seconds between two attempts to make it read-only again: at first, and at most"""
_LONG = 2.0
"""seconds of attempts, after which an event tells of them"""

_CHANGES = (
    fuse.FUSE_SETATTR, fuse.FUSE_SYMLINK, fuse.FUSE_MKNOD, fuse.FUSE_MKDIR, fuse.FUSE_UNLINK, fuse.FUSE_RMDIR,
    fuse.FUSE_RENAME, fuse.FUSE_RENAME2, fuse.FUSE_LINK, fuse.FUSE_SETXATTR, fuse.FUSE_REMOVEXATTR, fuse.FUSE_CREATE,
    fuse.FUSE_TMPFILE, fuse.FUSE_WRITE, fuse.FUSE_FALLOCATE, fuse.FUSE_COPY_FILE_RANGE,
)  # fmt: skip

_deciding = threading.Lock()
"""held, and only for a moment, by whoever changes a `Reopening` or the handlers of its mount"""


class _Denied(OSError):
    """The kernel has not made it writable."""


def reopen(mount: Mount, carry: Callable[[], object]) -> None:
    """While a remount to read-only waits for us: have `carry` called as soon as it is over, with files to be opened.

    Returns when nobody's syncfs(2) can come in between, or after a second.
    """
    with _deciding:
        state = mount.reopening
        if state is not None and not state.over:
            state.again = True
            return
        if not mount.begin():
            return
        state = mount.reopening = Reopening()
    thread = threading.Thread(target=_run, args=(mount, state, carry), daemon=True)
    try:
        thread.start()
    except RuntimeError as problem:  # no more threads
        _forget(mount, state)
        mount.events.say("cursor not set", mount=mount.target, why=str(problem))
        return
    deadline = time.monotonic() + _IN_LINE
    while thread.is_alive() and not caller.of(state.thread).is_remount and time.monotonic() < deadline:
        time.sleep(_PAUSE / 10)
    with _deciding:
        state.late = True


def _forget(mount: Mount, state: Reopening) -> None:
    with _deciding:
        state.over = True
        if mount.reopening is state:
            mount.reopening = None
    mount.end()


def _run(mount: Mount, state: Reopening, carry: Callable[[], object]) -> None:
    try:
        with place(mount) as directory:
            if not _begin(state, directory):
                raise OSError(errno.ETIMEDOUT, "the way to the mount took too long")
            try:
                while not state.over:
                    _once(mount, state, carry)
            finally:
                _end(mount, state)
    except OSError as problem:
        mount.events.say("cursor not set", mount=mount.target, why=str(problem))
    except Exception:
        mount.events.crash(f"reopening {mount.target}")
    finally:
        _forget(mount, state)


def _begin(state: Reopening, directory: int) -> bool:
    with _deciding:
        if not state.late:
            state.directory = directory
            state.thread = threading.get_native_id()
    return state.thread != 0


def _end(mount: Mount, state: Reopening) -> None:
    with _deciding:
        state.over = True
        state.thread = 0  # closing our directory may be what ends the mount: that is a question like others
        mount.handlers = mount.served
    if state.guard >= 0:
        os.close(state.guard)


def _once(mount: Mount, state: Reopening, carry: Callable[[], object]) -> None:
    """Make it writable, carry, and make it read-only again. OSError: it could not be made writable."""
    _refuse_changes(mount, state)
    denied = False
    try:
        _make_writable(state)
        carry()
    except _Denied:
        denied = True
        raise
    except Exception:
        mount.events.crash(f"setting the cursor of {mount.target}")
    finally:
        if not denied:
            _make_read_only(mount, state)
    with _deciding:
        owed = state.again and mount.account is not None and mount.account.owed() is not None
        state.again = False
        state.over = state.overtaken.is_set() or mount.gone or not owed


def _make_writable(state: Reopening) -> None:
    with contextlib.suppress(OSError):  # without CAP_SYS_NICE it is a matter of microseconds
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        mounts.reconfigure(state.directory, "rw")
    except OSError as problem:
        raise _Denied(problem.errno, problem.strerror) from None
    finally:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _make_read_only(mount: Mount, state: Reopening) -> None:
    """Ask until it is so, unless somebody else has remounted it to writable since, or the mount is dead."""
    state.closing = True
    began, pause, said = time.monotonic(), _PAUSE, False
    while _refuse_changes(mount, state) and not mount.gone:
        try:
            mounts.reconfigure(state.directory, "ro")
            break
        except Exception as problem:
            _refuse_changes(mount, state)
            if not said and time.monotonic() - began > _LONG:
                said = True
                mount.events.say("not read-only again yet, refuses changes", mount=mount.target, why=str(problem))
        state.overtaken.wait(pause)
        pause = min(2 * pause, _LONGEST)
    state.closing = False


def _refuse_changes(mount: Mount, state: Reopening) -> bool:
    """Whether we have to: nobody else has made it writable."""
    with _deciding:
        if state.overtaken.is_set():
            return False
        mount.handlers = _refusing(mount)
        return True


def asked(mount: Mount, state: Reopening) -> None:
    """Our own thread's request has made the kernel ask for a flush.

    If it is to be read-only again, then the kernel refuses changes by now: we need not, and soon must not. If it was to
    be made writable, then somebody else has made it so since the remount.
    """
    with _deciding:
        if not state.closing:
            state.overtaken.set()
        mount.handlers = mount.served


def remounted(mount: Mount) -> None:
    """Somebody else remounts it, and waits for us: if to writable, then it is as he says from now on. A worker's."""
    with _deciding:
        state = mount.reopening
        if state is None or state.over or state.directory < 0 or state.overtaken.is_set():
            return
        directory = os.dup(state.directory)
    try:
        guard = open_hidden(mount, directory)
    except OSError as problem:
        if problem.errno != errno.EROFS:
            mount.events.say("stays read-only", mount=mount.target, why=str(problem))
        return
    finally:
        os.close(directory)
    with _deciding:
        if not state.over:
            state.guard, guard = guard, -1
            state.overtaken.set()
            mount.handlers = mount.served
    if guard >= 0:
        os.close(guard)


def _refusing(mount: Mount) -> list[Callable[[Mount, Request], bytes | memoryview | None]]:
    table = list(mount.served)
    for opcode in _CHANGES:
        table[opcode] = _refuse
    table[fuse.FUSE_OPEN] = _open_to_read
    table[fuse.FUSE_IOCTL] = _get_flags
    return table


def _refuse(mount: Mount, request: Request) -> bytes:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def _open_to_read(mount: Mount, request: Request) -> bytes | memoryview | None:
    if request.arg[0] & (os.O_ACCMODE | os.O_TRUNC):
        return _refuse(mount, request)
    return mount.served[fuse.FUSE_OPEN](mount, request)


def _get_flags(mount: Mount, request: Request) -> bytes | memoryview | None:
    return _refuse(mount, request) if flags.changes(request) else mount.served[fuse.FUSE_IOCTL](mount, request)
