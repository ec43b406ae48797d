"""Mechanisms of the server, switched off one by one: a test that still passes without one does not test it.

This module is imported by a server that a test starts, before the server's own modules bind what is replaced here.
"""

import errno
import json
import os
from contextlib import suppress


def turn_off(names: str) -> None:
    """Switch off what `names` (comma-separated) says."""
    for word in filter(None, names.split(",")):
        name, _, argument = word.partition(":")
        globals()[name](*filter(None, [argument]))


def telling() -> None:
    """The superblock's cursor is never set: SYNCFS is answered after the flush, and that is all."""
    from overt.server import syncing

    syncing.poison = lambda *_: None


def holding() -> None:
    """The cursor is set when the caller has its answer already."""
    from overt.server import syncing

    def settle(mount, request, call, error):
        owed = mount.account.owed()
        try:
            with mount.settling:
                mount.send(mount.session.empty(request.unique))
                if owed is not None:
                    syncing.poison(mount, owed.errno, call)
                    mount.account.propagated(owed)
        finally:
            mount.end()

    syncing._settle = settle


def cursor() -> None:
    """No cursor is set; the answer to SYNCFS carries the error, whoever asked."""
    from overt.server import caller, syncing

    syncing.poison = _cannot
    caller.Call.is_sync = property(lambda call: False)
    real = syncing._settle

    def settle(mount, request, call, error):
        owed = mount.account.owed()
        real(mount, request, call, error or (owed and OSError(owed.errno, "owed")))
        if owed is not None:
            mount.account.propagated(owed)

    syncing._settle = settle


def _cannot(*_, **__):
    raise OSError(errno.EPERM, "switched off")


def own_cursors() -> None:
    """All overlays of an upper share one cursor: what one was told, the others are not."""
    from overt.ledger import Account

    real = Account.propagated

    def propagated(self, error):
        for account in self.ledger.accounts:
            real(account, error)

    Account.propagated = propagated


def baseline() -> None:
    """An overlay counts from the beginning, not from its mount."""
    from overt.ledger import Ledger

    real = Ledger.open_account

    def open_account(self, name, *, volatile=False):
        account = real(self, name, volatile=volatile)
        account.mounted_at = account.reached = 0
        return account

    Ledger.open_account = open_account


def own_descriptors() -> None:
    """fsync goes through one descriptor for all who have the file open."""
    from overt.server import syncing

    real = syncing._flush

    def flush(mount, request, handle):
        handles = handle.node.handles or {handle}
        return real(mount, request, min(handles, key=lambda handle: handle.fh))

    syncing._flush = flush


class _Os:
    """The os module as one module sees it, with some of its functions replaced."""

    def __init__(self, **replaced):
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(os, name)


def reopening_files() -> None:
    """Files that are open when they are copied up stay as they were opened."""
    from overt.tree import copyup

    copyup.os = _Os(dup2=lambda *_, **__: None)


def directory_fsync() -> None:
    """FSYNCDIR is answered with 0."""
    from overt.server import syncing

    syncing.fsyncdir = lambda mount, request: mount.session.empty(request.unique)


def flushing() -> None:
    """SYNCFS does not flush the upper."""
    from overt.upper.eyes import Eyes, Flushed

    Eyes.flush = lambda self: Flushed(None, 0)


def coalescing() -> None:
    """Each SYNCFS has a flush of its own."""
    from overt.upper.flusher import Flusher

    def ask(self, done):
        done(self._flush())

    Flusher.ask = ask


def quiet_sync() -> None:
    """sync(2) is served as syncfs(2) is: flush, and answer."""
    from overt.server import caller

    caller.Call.is_sync = property(lambda call: False)


def volatile_check() -> None:
    """A volatile mount answers 0 without having looked."""
    from overt.server import syncing

    syncing._volatile = lambda mount, request: mount.session.empty(request.unique)


def volatile_quiet() -> None:
    """A volatile mount flushes as an ordinary one does."""
    from overt.server import syncing

    def volatile(mount, request):
        def work():
            if request.arg and request.arg[0] in mount.handles:
                os.fsync(mount.handles[request.arg[0]].fd)
            return mount.session.empty(request.unique)

        mount.submit(request, work)

    syncing._volatile = volatile


def volatile_open() -> None:
    """O_SYNC is passed on to the backing file of a volatile mount."""
    from overt.server import data

    data._SYNC = 0


def eyes() -> None:
    """The upper is seen by a cursor only, which robs the host."""
    from overt.upper import probes

    probes.mount = _cannot
    tracing()


def eyes_but_tracing() -> None:
    """Kernel overlayfs does not take the upper; there is the tracepoint, and a cursor to flush with."""
    from overt.upper import probes

    probes.mount = _cannot


def tracing() -> None:
    """There is no tracefs."""
    from overt.upper import upper

    upper.Trace = _cannot


def work_check() -> None:
    """What a volatile mount left dirty is mounted again."""
    from overt.server import layers

    layers._names = lambda base, path: []


def copy_flush() -> None:
    """A copy-up is not flushed before it gets its name."""
    from overt.tree import copyup

    real = copyup._copy
    copyup._copy = lambda *args, flush, **rest: real(*args, flush=False, **rest)


def faults(path: str) -> None:
    """One system call of a copy-up fails: the file `path` says which one, counted from when it was written, and how."""
    from overt.tree import copyup, index

    state = {"mark": 0, "count": 0}

    def counted(name, call):
        def attempt(*args, **options):
            mark = os.stat(path).st_mtime_ns
            with open(path) as file:
                number, code = json.loads(file.read() or "[0, 0]")
            if mark != state["mark"]:
                state.update(mark=mark, count=0)
            if not number:
                return call(*args, **options)
            state["count"] += 1
            if state["count"] == number:
                with open(path.removesuffix(".json") + ".log", "w") as log:
                    log.write(f"{number}: {name}{args}")
                raise OSError(code, os.strerror(code))
            return call(*args, **options)

        return attempt

    class Module:
        """`os` or `fcntl` as copyup and index see it; closing does not fail."""

        def __init__(self, module):
            self.module = module

        def __getattr__(self, name):
            value = getattr(self.module, name)
            if not callable(value) or isinstance(value, type) or name in ("close", "fsencode", "fsdecode", "strerror"):
                return value
            return counted(name, value)

        @staticmethod
        def module_counted(name, call):
            return counted(name, call)

    copyup.os = Module(os)
    copyup.fcntl = Module(copyup.fcntl)
    copyup.utimensat = counted("utimensat", copyup.utimensat)
    index.os = copyup.os
    index.utimensat = copyup.utimensat


def fuseblk() -> None:
    """There is no loop device, so the mount is a plain fuse one, to which this kernel does not send SYNCFS."""
    from overt.server import connect

    connect._mount_block = _cannot


def callers_descriptor() -> None:
    """The cursor is not set through the caller's descriptor."""
    from overt.server import poison

    poison._callers = _cannot


def reopening() -> None:
    """A read-only superblock stays read-only."""
    from overt.server import syncing

    syncing.reopen = lambda mount, carry: None


def overtaking() -> None:
    """The server does not look whether somebody else makes a superblock writable that is so for its sake."""
    from overt.server import syncing

    syncing.remounted = lambda mount: None


def threads() -> None:
    """There are no more threads to reopen a superblock."""
    from types import SimpleNamespace

    from overt.server import reopening

    class Thread(reopening.threading.Thread):  # type: ignore[name-defined]
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    reopening.threading = SimpleNamespace(Thread=Thread)


def no_more_threads(path: str) -> None:
    """While the file `path` exists there are only as many more threads as it has bytes, as at the end of pids.max."""
    import threading

    real = threading.Thread.start

    def start(thread):
        with suppress(FileNotFoundError):
            left = os.stat(path).st_size
            if not left:
                raise RuntimeError("can't start new thread")
            os.truncate(path, left - 1)
        real(thread)

    threading.Thread.start = start


def dropping() -> None:
    """What a write must not leave, the setuid bit, cannot be taken away from a file."""
    from overt.server import data

    data.drop_privileges = _cannot


def refusing() -> None:
    """The server refuses no changes while a read-only superblock is writable for its sake."""
    from overt.server import reopening

    reopening._refusing = lambda mount: mount.served


def own_place() -> None:
    """The cursor is not set through the place where the server mounted."""
    from overt.server import poison

    poison._ours = _cannot


def own_clone() -> None:
    """The cursor is not set through a clone of the place where the server mounted."""
    from overt.server import poison

    poison._through_ours = _cannot


def unlocking() -> None:
    """The cursor is not set through a clone of a read-only mount."""
    from overt.server import poison

    poison._unlocked = _cannot


def lookout() -> None:
    """Nobody takes the loop over from a leader that is kept."""
    from overt.server.engine import Engine

    Engine._look_out = lambda self: None


def restless() -> None:
    """The loop changes hands all the time: a parameter here, not a switch."""
    from overt.server import engine

    engine._PATIENCE, engine._BEAT = 1e-5, 2e-4


def again() -> None:
    """Nothing is switched off: one more server."""


def patience() -> None:
    """The watchdog is an impatient one: a parameter here, not a switch."""
    from overt.server import watchdog

    watchdog.PATIENCE = 1.0
    watchdog.Watchdog.__init__.__kwdefaults__.update(period=0.3, patience=1.0)


def talking() -> None:
    """The kernel does not begin to talk."""
    from overt.server.mount import Mount

    def negotiate(self, seconds):
        raise OSError(errno.ETIMEDOUT, "the kernel did not begin to talk")

    Mount.negotiate = negotiate


def aborting() -> None:
    """The connection is aborted when the hidden file is open, and before its page is there: a moment to be hit."""
    from overt.host import memory
    from overt.server.watchdog import abort

    real = memory.write_through_mapping

    def write_through_mapping(fd, size):
        abort(os.fstat(fd).st_dev)
        real(fd, size)

    memory.write_through_mapping = write_through_mapping


def settling() -> None:
    """Little time to set a cursor in: a parameter."""
    from overt.server import syncing

    syncing._PATIENCE = 1.0


def naming() -> None:
    """Few lost files are named: a parameter."""
    from overt.server import syncing

    syncing.NAMED = 2


def closing() -> None:
    """Little time for everything to be unmounted in when the server ends: a parameter."""
    from overt.server import service

    service._CLOSING = 2.0


def outliving() -> None:
    """The server keeps no descriptor of its mount namespace."""
    from overt.host import process

    process.outlive_mount_namespace = lambda: None


def asking() -> None:
    """setfsuid(2) is taken at its word, which is that it has succeeded."""
    from overt.server import identity

    identity.filesystem_ids = lambda: (identity._me.uid, identity._me.gid)


def faults_of_changes(path: str) -> None:
    """The same for the system calls that make, remove and rename names, once what is concerned is in the upper."""
    from overt.tree import change, copyup, making, owners, steps

    kept = copyup.os, copyup.fcntl, copyup.utimensat
    faults(path)
    owners.os = copyup.os
    counted, (copyup.os, copyup.fcntl, copyup.utimensat) = copyup.os, kept
    steps.os = making.os = change.os = counted
    making.renameat2 = change.renameat2 = counted.module_counted("renameat2", change.renameat2)


def last_flush() -> None:
    """Nothing is flushed when the kernel says goodbye to a mount, or is done with it."""
    from overt.server import report

    real = report.flush
    report.flush = lambda mount, seconds=None: real(mount) if seconds is None else None


def slow_flush(seconds: str) -> None:
    """A flush for somebody who unmounts takes so long: time in which others can come."""
    import time

    from overt.server import report

    real = report.flush

    def flush(mount, patience=None):
        time.sleep(float(seconds))
        return real(mount, patience)

    report.flush = flush


def slow_connect(seconds: str) -> None:
    """It takes so long to make a mount, but the first."""
    import time

    from overt.server import service

    real, made = service.connect, []

    def connect(options):
        if made:
            time.sleep(float(seconds))
        made.append(options)
        return real(options)

    service.connect = connect


def unmounting() -> None:
    """Little time to wait for the disk when the kernel says goodbye: a parameter."""
    from overt.server import ending

    ending.PATIENCE = 2.0


def first_flush() -> None:
    """`overt umount` does not flush before it unmounts, so that all is left for the flush that others wait for."""
    from overt.server import report

    real = report.flush
    report.flush = lambda mount, seconds=None: None if seconds is None else real(mount, seconds)


def remount_as_sync() -> None:
    """A remount is taken for a sync(2), which no test may call: it waits for every filesystem of the machine."""
    from overt.server import caller

    caller.Call.is_sync = caller.Call.is_remount
    caller.Call.is_remount = property(lambda call: False)
