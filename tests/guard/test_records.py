"""What the supervisor has of an upper is never older than what it had, nor than what the accounts on it say."""

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from overt.guard import resume
from overt.guard.records import Records
from overt.guard.store import Entry, Keeper, Store
from overt.lab import Disk
from overt.ledger import Ledger
from overt.upper import Upper, Uppers
from overt.upper.eyes import superblock
from overt.upper.trace import Trace

from .ground import EIO, fail

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]


class Slow(Keeper):
    """The first to put something is a thread that was interrupted just then."""

    def __init__(self, supervisor: socket.socket) -> None:
        super().__init__(supervisor)
        self.came = threading.Event()
        self.goes_on = threading.Event()

    def put(self, name: str, value: Any, fds: Sequence[int] = ()) -> None:
        if not self.came.is_set():
            self.came.set()
            assert self.goes_on.wait(30)
        super().put(name, value, fds)


class Kept:
    """An upper with one overlay, records, and the store that they arrive in."""

    def __init__(self, stack: ExitStack) -> None:
        self.disk = stack.enter_context(Disk("ext4"))
        self.trace = Trace()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.callback(ours.close)
        stack.callback(theirs.close)
        self.keeper = Slow(ours)
        self.records = Records(self.keeper, self.trace)
        self._supervisor = theirs
        uppers = Uppers(trace=self.trace)
        stack.callback(uppers.close)
        directories = [Path(self.disk.path, name) for name in ("beside", "scratch")]
        for each in directories:
            each.mkdir()
        fds = [os.open(each, os.O_RDONLY) for each in directories]
        self.upper: Upper = uppers.get(fds[0], fds[1])
        self.upper.attach("overlay", volatile=False)
        for fd in fds:
            os.close(fd)

    def keep(self) -> threading.Thread:
        thread = threading.Thread(target=self.records.keep, args=(self.upper,))
        thread.start()
        return thread

    def lose(self) -> None:
        with open(Path(self.disk.path, "victim"), "wb") as file:
            file.write(self.disk.marker * 256)
        fail(self.disk)
        self.upper.check()

    def errors(self) -> int:
        """How many the supervisor knows of."""
        store = Store()
        self._supervisor.setblocking(False)
        with pytest.raises(BlockingIOError):
            while store.hear(self._supervisor):
                pass
        (entry,) = store.entries.values()
        known = len(entry.value["errors"])
        store.drop(f"upper/{self.upper.s_dev}")
        return known


@pytest.fixture
def kept() -> Iterator[Kept]:
    with ExitStack() as stack:
        yield Kept(stack)


def test_what_is_kept_last_is_the_newest(kept: Kept) -> None:
    first = kept.keep()
    assert kept.keeper.came.wait(10)
    kept.lose()
    second = kept.keep()
    second.join(0.3)
    kept.keeper.goes_on.set()
    for thread in (first, second):
        thread.join(10)
    assert kept.errors() == 1


def test_events_that_came_after_what_was_kept_are_still_noted(kept: Kept) -> None:
    thread = kept.keep()
    assert kept.keeper.came.wait(10)
    kept.lose()  # and its worker dies here
    kept.keeper.goes_on.set()
    thread.join(10)
    assert kept.errors() == 0
    kept.trace.expect([kept.upper.s_dev])
    watch = kept.trace.watch(kept.upper.s_dev)
    assert watch.take().lost
    watch.close()


def test_numbers_that_an_account_has_reached_are_not_given_away_again(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        entries = {
            f"upper/{superblock(fd)}": Entry({"errors": [[1, EIO, 1.0, "probe", False]]}, ()),
            "overlay/1": Entry({"upper": superblock(fd), "account": {"mounted_at": 0, "reached": 2}}, (fd, fd, fd)),
            "overlay/2": Entry({"upper": superblock(fd), "account": {"mounted_at": 0, "reached": 1}}, (fd, fd, fd)),
        }
        (errors,) = resume.known_errors(entries).values()
    finally:
        os.close(fd)
    ledger = Ledger()
    ledger.errors.extend(errors)
    accounts = [ledger.open_account(name) for name in ("told", "not told")]
    for account, reached in zip(accounts, (2, 1), strict=True):
        account.mounted_at, account.reached = 0, reached
    assert [account.owed() is not None for account in accounts] == [False, True]
    assert ledger.record(EIO, 2.0, "trace").number == 3
    assert [account.syncfs(account.open()) for account in accounts] == [EIO, EIO]
