"""Questions whether data is safe: FSYNC, FSYNCDIR, SYNCFS. What is answered, the ledger decides.

SYNCFS of an ordinary mount: the upper is flushed, then read (overt.upper, one flush for all who asked before it began);
what this overlay is owed is put on its superblock's own cursor (server/poison.py); only then the request is answered,
and the kernel tells the caller's open file as errseq says. sync(2) sends the same request to every mount, throws the
answer away, and flushes the upper itself, so it is answered at once: it costs nothing and takes nothing from anybody.
Unless the kernel has written pages to us that were dirtied through a mapping: sync(2) writes the data of all
superblocks in turn (fs/sync.c, ksys_sync), the upper's before this mount's, so that these may be in the upper's cache
and nowhere else. umount(2) has a request of its own, server/ending.py.
"""

import errno
import os
import threading
import time

from overt.fuse.request import Request
from overt.host import process
from overt.ledger import Account, UpperError
from overt.server import caller
from overt.server.directories import open_upper
from overt.server.mount import Handle, Mount
from overt.server.poison import poison
from overt.server.reopening import asked, remounted, reopen
from overt.tree.layer import UPPER
from overt.tree.node import Node
from overt.wire import fuse

Reply = bytes | memoryview | None

NAMED = 1000
"""how many lost files are kept by name"""
_ASLEEP = 1.0
"""seconds for who asks a volatile mount to go to sleep, so that his call can be seen"""
_PATIENCE = 10.0
"""seconds for a cursor to be set, which takes less than a millisecond"""


def fsync(mount: Mount, request: Request) -> Reply:
    """FSYNC: through the open file's own descriptor, whose cursor in the upper is the caller's."""
    handle = mount.open_handle(request.arg[0])
    if mount.volatile:
        return _volatile(mount, request)
    if handle.node.layer != UPPER:  # nobody can have written to it
        return mount.session.empty(request.unique)
    if handle.node.data is not None:  # its attributes alone are in the upper
        return _flush_attributes(mount, request, handle.node)
    return _flush(mount, request, handle)


def _flush_attributes(mount: Mount, request: Request, node: Node) -> Reply:
    if request.arg[1] & fuse.FUSE_FSYNC_FDATASYNC:
        return mount.session.empty(request.unique)
    fd = mount.tree.open_own(node, os.O_RDONLY)

    def work() -> bytes:
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        return mount.session.empty(request.unique)

    mount.submit(request, work)
    return None


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
            if len(mount.lost) < NAMED:
                mount.lost[name] = None
            mount.events.say("file lost", mount=mount.target, file=name, error=error.errno, call="fsync")
            raise
        finally:
            if not mount.tells_syncfs and mount.upper is not None:
                mount.upper.check()  # syncfs will not reach us: what can be known has to be known now
        return mount.session.empty(request.unique)

    mount.submit(request, work)
    return None


def _volatile(mount: Mount, request: Request) -> Reply:
    """What a volatile mount answers to every question: EIO after any error since it was mounted. Nothing is flushed."""
    assert mount.upper is not None and mount.account is not None
    mount.upper.check()
    code = mount.account.sticky()
    if not code:
        return mount.session.empty(request.unique)
    if request.opcode == fuse.FUSE_SYNCFS:
        mount.begin()
        _answer_volatile(mount, mount.account, request, code, time.monotonic() + _ASLEEP)
        return None
    mount.account.tell(code)
    return mount.session.error(request.unique, code)


def _answer_volatile(mount: Mount, account: Account, request: Request, code: int, deadline: float) -> None:
    """Answer, and count it if somebody is told: a remount's caller is not. By no worker, who may wait for a disk."""
    call = caller.of(request.pid)
    if call.is_moving and time.monotonic() < deadline:
        mount.loop.post(lambda: _answer_volatile(mount, account, request, code, deadline), mount)
        return
    if call.is_question:
        account.tell(code)
    _answer(mount, request, code)


def syncfs(mount: Mount, request: Request) -> Reply:
    """SYNCFS: syncfs(2), and what sync(2) and a remount send."""
    mount.tells_syncfs = True
    if mount.upper is None or mount.probing:
        return mount.session.empty(request.unique)
    reopening = mount.reopening
    if reopening is not None and request.pid == reopening.thread != 0:
        asked(mount, reopening)
        return mount.session.empty(request.unique)
    if mount.volatile:
        return _volatile(mount, request)
    mount.begin()
    call = caller.of(request.pid)
    if call.is_moving:
        mount.pool.see_to(_when_seen, mount, request)
    else:
        _ask(mount, request, call)
    return None


def _when_seen(mount: Mount, request: Request) -> None:
    """The caller was still on its way to sleep when it was looked at. Made by a worker."""
    _ask(mount, request, caller.wait_for(request.pid))


def _ask(mount: Mount, request: Request, call: caller.Call) -> None:
    """Flush and look, then answer; a sync(2) is answered at once where that is enough."""
    upper, account = mount.upper, mount.account
    assert upper is not None and account is not None
    if call.is_sync and not mount.written_back:
        _answer(mount, request, 0)
        return
    mount.written_back = False

    def flushed(error: OSError | None) -> None:
        quiet = error is None and account.heard == account.ledger.count
        if quiet and not (call.is_remount and mount.reopening is not None):
            _answer(mount, request, 0)
        else:
            mount.pool.see_to(_settle, mount, request, call, error)

    try:
        upper.flush(flushed)
    except RuntimeError as problem:  # no more threads
        mount.events.say("not flushed", mount=mount.target, why=str(problem))
        _answer(mount, request, errno.EIO)


def _answer(mount: Mount, request: Request, code: int) -> None:
    session = mount.session
    mount.send(session.error(request.unique, code) if code else session.empty(request.unique))
    mount.end()


def _settle(mount: Mount, request: Request, call: caller.Call, error: OSError | None) -> None:
    """After the flush: carry over what is owed, and answer. Made by a worker."""
    code = error.errno or errno.EIO if error is not None else 0
    try:
        if call.is_remount:
            remounted(mount)
        if call.is_question or call.is_remount:
            # A flush that failed is on the cursor too, so that who is told by this answer is not told again. What
            # cannot be put there is told by this answer; it stays owed, and the next to ask is told as well.
            owed = _carry(mount, call)
            if owed and mount.refuses and call.is_remount:
                # Not while `settling` is held: who is in syncfs(2) has s_umount, for which it waits, and may need that.
                reopen(mount, lambda: _carry(mount, caller.NOBODY))
            code = owed or code
    except Exception:
        mount.events.crash(f"syncfs on {mount.target}")
        code = code or errno.EIO
    finally:
        _answer(mount, request, code)


def carry_over(mount: Mount) -> None:
    """Where the kernel keeps syncfs(2) from us: put a known error on the cursor at once. Made by a worker."""
    try:
        _carry(mount, caller.NOBODY)
    except Exception:
        mount.events.crash(f"carrying an error over to {mount.target}")
    mount.end()


def _carry(mount: Mount, call: caller.Call) -> int:
    """Put what the overlay is owed on its superblock's cursor; return 0, or the errno that could not be put there.

    In bounded time: the ways to the cursor lead over paths and descriptors that are not ours, and what they are of may
    hang (server/poison.py). One thread for each mount at most is left behind there; if it gets through after all, it
    says so in the ledger.
    """
    account = mount.account
    assert account is not None
    with mount.settling:
        owed = account.owed()
        if owed is None:
            if call.is_question and account.heard < account.reached:  # put there before, when nobody had asked
                _told(mount, account)
            return 0
        if mount.settler is None or not mount.settler.is_alive():
            mount.settler = threading.Thread(target=_set_cursor, args=(mount, account, owed, call), daemon=True)
            try:
                process.start(mount.settler)
                mount.settler.join(_PATIENCE)
            except OSError as problem:
                mount.events.say("cursor not set", mount=mount.target, why=str(problem))
        if mount.settler.is_alive():
            mount.events.say("cursor not set", mount=mount.target, why=f"no answer in {_PATIENCE:g} s, still waiting")
        if account.reached >= owed.number:
            return 0
        return account.tell(owed.errno) if call.is_question else owed.errno


def _told(mount: Mount, account: Account) -> None:
    """Note that somebody was told of what the cursor carries."""
    newest = account.ledger.newest
    assert newest is not None
    account.tell(newest.errno)
    mount.events.say("told", mount=mount.target, error=newest.errno, number=account.reached)


def _set_cursor(mount: Mount, account: Account, owed: UpperError, call: caller.Call) -> None:
    try:
        poison(mount, owed.errno, call)
    except OSError as problem:
        mount.events.say("cursor not set", mount=mount.target, why=str(problem))
    except Exception:
        mount.events.crash(f"setting the cursor of {mount.target}")
    else:
        account.propagated(owed)
        if call.is_question:
            _told(mount, account)
        else:
            mount.events.say("carried over", mount=mount.target, error=owed.errno, number=owed.number)
