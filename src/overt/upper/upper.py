"""Uppers: each upper filesystem of this process, with its eyes, its ledger and its flusher, shared by all its overlays.

What an upper is asked, and what each costs:

    check()     has an error been recorded?    no flush, no write, no wait; a few microseconds; any thread
    flush()     make everything durable,       one flush for all who ask at the same time; the answer comes
                then check                     on the flusher's thread

Both put what they see into the ledger, where each overlay finds what it owes to its descriptions. So an answer of None
to `flush` means "the flush went through", and not "there was no error".

A flush that itself fails (a device flush, a journal being aborted, a filesystem that was shut down) is an error of the
upper too, for every overlay on it; `Health` has the details.

Locks: `_lock` is held for microseconds and guards the ledger and the state of the eyes; `_disk` is held as long as the
disk takes, and serialises flushes with the mounting of fresh probes; so is `_door`, through which overlays come and go
one at a time. Nobody who holds `_lock` waits for one of these. `Uppers.lock` guards what all uppers share, and nobody
who holds it waits for any disk: one that hangs keeps nobody from another.
"""

import errno
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from overt.ledger import Account, Ledger, UpperError
from overt.upper.eyes import Carried, Eyes, Flushed, Sighting, has_a_name, superblock
from overt.upper.flusher import Done, Flusher
from overt.upper.health import Health
from overt.upper.trace import MOST_INODES, Span, Trace

OnError = Callable[[UpperError, "Upper"], None]


class Failed(NamedTuple):
    """A failed write-back of an inode."""

    number: int
    """of the error it was seen in"""
    when: float
    """the first event of it, seconds of CLOCK_MONOTONIC"""
    last: float
    """the last one in that error, likewise"""


class _History(NamedTuple):
    """What is remembered of an inode that failed: its first error and its last, and the number of the one before."""

    first: Failed
    before: int
    last: Failed


class _Doors(NamedTuple):
    """Directories of the overlay that is being mounted; the caller's."""

    directory_fd: int
    scratch_fd: int


class Upper:
    """One upper filesystem. Made by `Uppers.get`; it holds nothing open before the first `attach`."""

    def __init__(self, uppers: "Uppers", s_dev: int) -> None:
        self.ledger = Ledger()
        self.s_dev = s_dev
        self.flushes = 0
        self.flushed_at = 0.0
        """when the last flush ended (CLOCK_MONOTONIC)"""
        self.taken = 0
        self._uppers = uppers
        self._doors = threading.local()  # two overlays may be mounted at the same time, a thread each
        self._eyes: Eyes | None = None
        self._flusher: Flusher | None = None
        self._health = Health()
        self._scratch: dict[Account, int] = {}
        self._failed: dict[int, _History] = {}  # by inode; who failed last is last
        self._unnamed = 0  # the number of the last error whose inodes are not all in there
        self._news: list[UpperError] = []
        self._lock = threading.Lock()
        self._disk = threading.Lock()
        self._door = threading.RLock()

    @property
    def eyes(self) -> str:
        """What it is seen with: ``probes+trace``, ``probes``, ``trace``, ``cursor``; empty without overlays."""
        return self._eyes.name if self._eyes else ""

    @property
    def refused(self) -> str:
        """Why there are no probes, or the empty string."""
        return str((self._eyes and self._eyes.refused) or "")

    @property
    def spent(self) -> bool:
        """Whether the next error is seen by a flush only."""
        return bool(self._eyes and self._eyes.spent)

    @property
    def failing(self) -> OSError | None:
        """With what every flush fails at present, or None."""
        return self._health.failing

    def attach(self, name: str, *, volatile: bool) -> Account:
        """An account for an overlay mounted now: errors recorded so far, those yet unseen included, are not told to it.

        To be called on the thread that called `Uppers.get`, while the descriptors given there are open. Raises OSError
        where the upper cannot be opened or, in the one case that needs a flush here (no tracepoint, and errors can be
        seen only by consuming them), flushed.
        """
        return self._attach(name, volatile, resumed=False)

    def resume(self, name: str) -> Account:
        """As `attach`, for an ordinary overlay that another process has left, with its eyes (`Uppers.carried`).

        Nothing is looked at, flushed or written here, for the disk may hang or be dead: what has happened meanwhile is
        seen at the next flush. The caller fills the account in. Raises OSError where no eyes were left.
        """
        if self._eyes is None and self.s_dev not in self._uppers.carried:
            raise FileNotFoundError(errno.ENOENT, "what it was watched with was not left", name)
        return self._attach(name, volatile=False, resumed=True)

    def _attach(self, name: str, volatile: bool, resumed: bool) -> Account:
        doors: _Doors = self._doors.open
        with self._door:
            scratch_fd = os.dup(doors.scratch_fd)
            try:
                eyes = self._open(doors)
                if not resumed:
                    self._prepare(eyes, volatile, scratch_fd)
                with self._lock:
                    if not resumed:
                        self._see(eyes)
                    account = self.ledger.open_account(name, volatile=volatile)
                    self._scratch[account] = scratch_fd
            except BaseException:
                os.close(scratch_fd)
                self._close_if_unused()
                raise
        self._announce()
        return account

    def _prepare(self, eyes: Eyes, volatile: bool, scratch_fd: int) -> None:
        self.check()
        if not volatile or eyes.need_flush:
            eyes.prepare_flush(scratch_fd)
        if eyes.need_flush:
            failure = self._flush(eyes, scratch_fd)
            if failure:
                raise failure

    def detach(self, account: Account) -> None:
        """Forget an overlay. With the last one everything is closed, after the flush that may be under way."""
        with self._door:
            with self._lock:
                self.ledger.close_account(account)
                scratch_fd = self._scratch.pop(account)
            try:
                os.close(scratch_fd)
                if self._forgo_flush():
                    self.check()
            finally:
                self._close_if_unused()

    def forgo(self) -> None:
        """Nothing came of the overlay for which `Uppers.get` was called: forget the upper if there is no other."""
        with self._door:
            self._close_if_unused()

    def _forgo_flush(self) -> bool:
        """When the last ordinary overlay goes, and not later, when a volatile one is the last of all: one flush more.

        Unless a flush is under way: who unmounts does not wait for it. Whether it was done.
        """
        quiet = all(account.volatile for account in self.ledger.accounts)
        if not self._eyes or not quiet or not self._disk.acquire(blocking=False):
            return False
        try:
            self._eyes.forgo_flush()
        finally:
            self._disk.release()
        return True

    def flush(self, *done: Done) -> None:
        """Have the upper flushed and checked, then `done` called on another thread: with None, or why the flush failed.

        The flush begins after this call; all who wait for one share it. RuntimeError if there are no overlays any more,
        or no thread for it.
        """
        self._open_flusher().ask(*done)

    def flush_here(self, done: Done) -> None:
        """The same, but on the calling thread if nobody else is flushing: for one who may wait for a disk."""
        flusher = self._open_flusher()
        if not flusher.ask_here(done):
            flusher.ask(done)

    def _open_flusher(self) -> Flusher:
        flusher = self._flusher
        if flusher is None:
            raise RuntimeError("flush of an upper without overlays")
        return flusher

    def check(self) -> None:
        """Enter errors that the upper has recorded since the last look into the ledger. Neither flushes nor waits."""
        with self._lock:
            assert self._eyes, "check of an upper without overlays"
            self._see(self._eyes)
        if self._news:
            self._announce()

    def carry(self) -> Carried | None:
        """What another process needs to go on where this one ends (`Uppers.carried`); None without overlays.

        The descriptors are duplicates, the caller's to close.
        """
        with self._lock:
            return self._eyes.carry() if self._eyes else None

    def failed(self, since: int, *, newest: bool = False) -> dict[int, Failed] | None:
        """The inodes of which data was lost in the errors numbered above `since`; None where they are not all known.

        Each with the first of these errors, or with one that came before it; with the last if the `newest` is wanted.
        """
        with self._lock:
            if self._unnamed > since:
                return None
            return {
                ino: each.last if newest or each.before <= since else each.first
                for ino, each in self._failed.items()
                if each.last.number > since
            }

    def _open(self, doors: _Doors) -> Eyes:
        if self._eyes:
            return self._eyes
        eyes = Eyes(self.s_dev, *doors, self._uppers.trace, self._uppers.carried.pop(self.s_dev, None))
        if self.ledger.errors:  # another process's
            self._health.doubt()
            self._unnamed = self.ledger.count
        with self._uppers.lock:
            self._uppers.known[self.s_dev] = self
        self._flusher = Flusher(
            lambda: self._flush_for_all(eyes), f"flush-{os.major(self.s_dev)}:{os.minor(self.s_dev)}"
        )
        self._eyes = eyes
        if eyes.standing:
            with self._lock:
                self.taken += eyes.standing.taken
                self._record(eyes.standing)
        return eyes

    def _close_if_unused(self) -> None:
        if self.ledger.accounts:
            return
        with self._uppers.lock:
            if self._uppers.known.get(self.s_dev) is self:
                del self._uppers.known[self.s_dev]
        with self._lock:  # a check that is under way still needs the descriptors
            eyes, flusher = self._eyes, self._flusher
            self._eyes = self._flusher = None
        if eyes and flusher:
            flusher.close(after=lambda: self._shut(eyes))

    def _shut(self, eyes: Eyes) -> None:
        """Let go of the eyes. What flushes goes first: that is one flush more, and they can still see it fail."""
        try:
            eyes.forgo_flush()
            with self._lock:
                self._see(eyes)
        finally:
            try:
                eyes.close()
            finally:
                self._announce()

    def _flush_for_all(self, eyes: Eyes) -> OSError | None:
        try:
            with self._disk:
                failure, _ = self._look_after_flush(eyes)
                if not self._in_question(eyes, failure):
                    return None
                with self._lock:
                    if not self._scratch:  # the last overlay has gone meanwhile
                        return failure
                    scratch_fd = self._live_scratch()
                try:
                    return self._settle(eyes, failure, scratch_fd)
                finally:
                    if scratch_fd >= 0:
                        os.close(scratch_fd)
        finally:
            if self._news:
                self._announce()

    def _flush(self, eyes: Eyes, scratch_fd: int) -> OSError | None:
        with self._disk:
            failure, _ = self._look_after_flush(eyes)
            return self._settle(eyes, failure, scratch_fd) if self._in_question(eyes, failure) else None

    def _look_after_flush(self, eyes: Eyes) -> Flushed:
        self.flushes += 1
        flushed = eyes.flush()
        self.flushed_at = time.monotonic()
        with self._lock:
            self._see(eyes, flushed.told)
        eyes.let_go_of_fired()
        return flushed

    def _in_question(self, eyes: Eyes, failure: OSError | None) -> bool:
        """Whether there is more to a flush than that it went through."""
        if eyes.turned_read_only():
            self._health.doubt()
        return failure is not None or eyes.spent or not self._health.sound

    def _settle(self, eyes: Eyes, failure: OSError | None, scratch_fd: int) -> OSError | None:
        """What a flush comes to that failed, or came after an error; `scratch_fd` -1: without a scratch directory."""
        if failure is None and eyes.spent and scratch_fd >= 0:
            self._renew(eyes, scratch_fd)
        failure, entry, source = self._health.judge(failure, scratch_fd)
        if entry:
            with self._lock:
                self._record(Sighting(entry.errno or errno.EIO, source, False, None))
        return failure

    def _renew(self, eyes: Eyes, scratch_fd: int) -> None:
        """Have a fresh probe. What is consumed for it may be the newest error, or one that came after it.

        After it, if somebody was told of the newest before this (a flush that failed has no fresh probe, say): it is
        entered then, for he would not be told of it. Where none came, that is a false alarm.
        """
        renewal = eyes.renew(scratch_fd)
        with self._lock:
            eyes.install(renewal)
            if not renewal.taken:
                return
            self.taken += 1
            if self.ledger.passed_on:
                self._record(Sighting(errno.EIO, "cursor", True, None))
            else:
                error = self.ledger.mark_taken()
                self._news = [other for other in self._news if other.number != error.number] + [error]

    def _live_scratch(self) -> int:
        """A duplicate of a scratch directory; if possible of one that still has a name (the next probe needs it).

        -1 where there is no descriptor left for it.
        """
        named = (fd for fd in self._scratch.values() if has_a_name(fd))
        try:
            return os.dup(next(named, next(iter(self._scratch.values()))))
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            return -1

    def _see(self, eyes: Eyes, told: int = 0) -> None:
        self.taken += bool(told)
        sighting = eyes.look(told)
        if sighting:
            self._record(sighting)

    def _record(self, sighting: Sighting) -> None:
        error = self.ledger.record(sighting.errno, time.time(), sighting.source, taken=sighting.taken)
        self._remember(error.number, sighting.inodes)
        self._health.doubt()
        self._news.append(error)

    def _remember(self, number: int, inodes: dict[int, Span] | None) -> None:
        if inodes is None:
            self._unnamed = number
            self._failed.clear()  # whoever asks for one of these asks for `number` too
            return
        for ino, when in inodes.items():
            last = Failed(number, *when)
            earlier = self._failed.pop(ino, None)
            self._failed[ino] = _History(*(earlier.first, earlier.last.number) if earlier else (last, 0), last)
        while len(self._failed) > MOST_INODES:
            self._unnamed = self._failed.pop(next(iter(self._failed))).last.number

    def _announce(self) -> None:
        with self._lock:
            news, self._news = self._news, []
        if self._uppers.on_error:
            for error in news:
                self._uppers.on_error(error, self)


class Uppers:
    """The uppers of one process, by superblock."""

    def __init__(self, on_error: OnError | None = None, *, trace: "bool | Trace" = True) -> None:
        """`on_error` is called once for each error recorded, and once more (`taken` set) for one that was taken later.

        It runs on whichever thread saw the error. With `trace` False the tracepoint is left alone; a Trace is one that
        was made already.
        """
        self.on_error = on_error
        self.known: dict[int, Upper] = {}
        self.lock = threading.Lock()
        self.untraced: OSError | None = None
        """why there is no tracepoint"""
        self.carried: dict[int, Carried] = {}
        """what another process left, by superblock: used when the first overlay there is attached"""
        self._wanted = trace is True
        self._trace = None if isinstance(trace, bool) else trace

    @property
    def trace(self) -> Trace | None:
        """The tracing instance, made when the first upper needs it; None where it cannot be had."""
        with self.lock:
            if self._trace is None and self._wanted:
                self._wanted = False
                try:
                    self._trace = Trace()
                except OSError as error:
                    self.untraced = error
            return self._trace

    def get(self, directory_fd: int, scratch_fd: int, s_dev: int | None = None) -> Upper:
        """The upper that the directory `directory_fd` is on; `scratch_fd` is a private directory there.

        Both have to stay open until `Upper.attach` has returned. `s_dev`: the superblock's number, if it is known; else
        it is asked for, which raises OSError as open(2) and flock(2) do.
        """
        if s_dev is None:
            s_dev = superblock(scratch_fd)
        with self.lock:
            upper = self.known.get(s_dev)
            if upper is None:
                upper = self.known[s_dev] = Upper(self, s_dev)
        upper._doors.open = _Doors(directory_fd, scratch_fd)
        return upper

    def close(self) -> None:
        """Let go of all uppers, with or without overlays, and of the tracepoint."""
        with self.lock:
            uppers = list(self.known.values())
        for upper in uppers:
            for account in list(upper.ledger.accounts):
                upper.detach(account)
        with self.lock:
            if self._trace:
                self._trace.close()
                self._trace = None
