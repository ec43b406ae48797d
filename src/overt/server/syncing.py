"""Questions whether data is safe: FSYNC, FSYNCDIR, SYNCFS. What is answered, the ledger decides.

SYNCFS of an ordinary mount: the upper is flushed, then read (overt.upper, one flush for all who asked before it began);
what this overlay is owed is put on its superblock's own cursor (server/poison.py); only then the request is answered, and
the kernel tells the caller's open file as errseq says. sync(2) sends the same request to every mount, throws the
answer away, and flushes the upper itself, so it is answered at once: it costs nothing and takes nothing from anybody.
"""

import os

from overt.fuse.session import Request
from overt.server import caller
from overt.server.directories import open_upper
from overt.server.mount import Handle, Mount
from overt.server.poison import poison
from overt.tree.layer import UPPER
from overt.wire import fuse

Reply = bytes | memoryview | None


def fsync(mount: Mount, request: Request) -> Reply:
    """FSYNC: through the open file's own descriptor, whose cursor in the upper is the caller's."""
    handle = mount.open_handle(request.arg[0])
    if mount.volatile:
        return _volatile(mount, request)
    if handle.node.layer != UPPER:  # nobody can have written to it
        return mount.session.empty(request.unique)
    return _flush(mount, request, handle)


def fsyncdir(mount: Mount, request: Request) -> Reply:
    """FSYNCDIR: reaches the upper directory."""
    handle = mount.open_handle(request.arg[0])
    if mount.volatile:
        return _volatile(mount, request)
    if handle.node.layer != UPPER or handle.node.dropped:
        return mount.session.empty(request.unique)
    if handle.fd < 0:
        handle.fd = open_upper(mount, handle.node)
    return _flush(mount, request, handle)


def _flush(mount: Mount, request: Request, handle: Handle) -> Reply:
    call = os.fdatasync if request.arg[1] & fuse.FUSE_FSYNC_FDATASYNC else os.fsync

    def work() -> bytes:
        try:
            call(handle.fd)
        except OSError as error:
            name = mount.tree.name_of(handle.node)
            mount.lost.append(name)
            mount.events.say("file lost", mount=mount.target, file=name, error=error.errno, call="fsync")
            raise
        return mount.session.empty(request.unique)

    mount.submit(request, work)
    return None


def _volatile(mount: Mount, request: Request) -> Reply:
    """What a volatile mount answers to every question: EIO after any error since it was mounted. Nothing is flushed."""
    assert mount.upper is not None and mount.account is not None
    mount.upper.check()
    code = mount.account.tell(mount.account.sticky())
    return mount.session.error(request.unique, code) if code else mount.session.empty(request.unique)


def syncfs(mount: Mount, request: Request) -> Reply:
    """SYNCFS: syncfs(2), and what umount(2) and sync(2) send."""
    mount.tells_syncfs = True
    if mount.upper is None or mount.probing:
        return mount.session.empty(request.unique)
    if mount.volatile:
        return _volatile(mount, request)
    call = caller.of(request.pid)
    if call.is_sync:
        return mount.session.empty(request.unique)

    def flushed(error: OSError | None) -> None:
        mount.pool.submit(_settle, mount, request, call, error)

    mount.begin()
    mount.upper.flush(flushed)
    return None


def _settle(mount: Mount, request: Request, call: caller.Call, error: OSError | None) -> None:
    """After the flush: carry over what is owed, and answer. Made by a worker."""
    account = mount.account
    assert account is not None
    code = error.errno or 5 if error is not None else 0
    try:
        with mount.settling:
            owed = account.owed()
            if owed is not None and (call.is_syncfs or not call.known):
                try:
                    poison(mount, owed.errno, call)
                except OSError as problem:
                    # Told by this answer then; it stays owed, and so the next one to ask is told as well.
                    mount.events.say("cursor not set", mount=mount.target, why=str(problem))
                    code = code or owed.errno
                else:
                    account.propagated(owed)
                    account.tell(owed.errno)
                    mount.events.say("told", mount=mount.target, error=owed.errno, number=owed.number)
    except Exception:
        mount.events.crash(f"syncfs on {mount.target}")
        code = code or 5
    session = mount.session
    mount.send(session.error(request.unique, code) if code else session.empty(request.unique))
    mount.end()
