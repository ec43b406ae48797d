"""The walk over descriptor tables: what it sees, what it does not see twice, and that it ends."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from overt.guard import descriptions, overlay
from overt.guard.descriptions import Held
from overt.guard.table import Mounted, Table
from overt.host import mounts
from overt.ledger import Description, Ledger

from .ground import wait_until
from .member import overlay as mount

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

MANY, SHARERS = 300, 5
CLONE_FILES, SIGCHLD = 0x400, 17
CLONE = {"x86_64": 56, "aarch64": 220}.get(os.uname().machine, -1)

SHARE = f"""
import ctypes, os, signal
libc = ctypes.CDLL(None)
null = os.open("/dev/null", os.O_RDONLY)
made = [os.dup(null) for _ in range({MANY})]
parent, pids = os.getpid(), [os.getpid()]
for _ in range({SHARERS}):
    pid = libc.syscall({CLONE}, {CLONE_FILES | SIGCHLD}, 0, 0, 0, 0)
    if pid == 0:
        libc.prctl(1, signal.SIGKILL)
        while os.getppid() == parent:
            libc.pause()
        os._exit(0)
    pids.append(pid)
print(*pids, flush=True)
print(*made, flush=True)
signal.pause()
"""

CHURN = """
import os, threading
print(os.open("/dev/null", os.O_RDONLY), flush=True)
def churn():
    while True:
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
for _ in range(3):
    threading.Thread(target=churn, daemon=True).start()
churn()
"""


@contextmanager
def script(text: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=20)


def numbers(process: "subprocess.Popen[str]") -> list[int]:
    assert process.stdout is not None
    return [int(word) for word in process.stdout.readline().split()]


def walk(*pids: int) -> Iterator[tuple[int, int]]:
    """What a walk sees of these processes, thread and descriptor; those that come meanwhile are walked as well."""
    skip = {int(name) for name in os.listdir("/proc") if name.isdigit()} - set(pids)
    return ((tid, fd) for tid, fd, _ in descriptions.walk(skip) if tid in pids)


def test_a_table_that_processes_share_is_walked_once() -> None:
    with script(SHARE) as process:
        pids, made = numbers(process), numbers(process)
        assert (len(pids), len(made)) == (SHARERS + 1, MANY)
        seen = [fd for _, fd in walk(*pids)]
        assert sorted(fd for fd in seen if fd in made) == made


def test_a_table_whose_first_sharer_ends_during_the_walk_is_seen_by_another() -> None:
    with script(SHARE) as process:
        pids, made = numbers(process), numbers(process)
        steps = walk(*pids[1:])
        tid, fd = next(steps)
        os.kill(tid, signal.SIGKILL)
        wait_until(lambda: Path(f"/proc/{tid}/stat").read_text().rpartition(")")[2].split()[0] == "Z", "it has ended")
        assert {fd, *(fd for _, fd in steps)} >= set(made)


def test_a_process_whose_threads_come_and_go_is_seen_every_time() -> None:
    with script(CHURN) as process:
        (fd,) = numbers(process)
        for _ in range(100):
            assert (process.pid, fd) in walk(process.pid)


def test_small_tables_come_before_large_ones() -> None:
    with script(SHARE) as large, script(CHURN) as small:
        pids, made = numbers(large), numbers(large)
        numbers(small)
        order = [tid in pids for tid, _ in walk(*pids, small.pid)]
        assert order == sorted(order)
        assert order.count(True) >= len(made)


def test_a_walk_ends() -> None:
    with pytest.raises(TimeoutError):
        list(descriptions.walk(set(), 0.0))


class Known:
    """An overlay, as far as a walk is concerned."""

    def __init__(self) -> None:
        self.device = 1
        self.lock = contextlib.nullcontext()
        self.account = Ledger().open_account("overlay")
        self.held = Held()
        self.held.add(os.open("/", os.O_RDONLY), Description(0), "held")
        self.incomplete = False

    def save(self) -> None:
        pass

    def prune(self, seen: set[int]) -> None:
        raise AssertionError("let go of what was not looked for")


def test_after_a_walk_that_was_broken_off_not_all_are_known_and_none_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(skip: set[int]) -> Iterator[tuple[int, int, bytes]]:
        yield os.getpid(), 99999, b"/proc/self/fd/99999"
        raise TimeoutError(errno.ETIMEDOUT, "too many")

    monkeypatch.setattr(descriptions, "walk", walk)
    known = Known()
    overlays: Any = {known.device: known}
    assert overlay.hold_open_ones(overlays, Table(), set()) == {known: "too many"}
    assert known.incomplete
    overlay.let_go_of_closed_ones(overlays, Table(), set())
    os.close(known.held.take(0)[0])


@pytest.fixture
def real(tmp_path: Path) -> Iterator[overlay.Overlay]:
    """One that is mounted, with an account in a ledger that has nothing to do with its upper."""
    mount(tmp_path)
    mounted = Table().mount_of(os.fsencode(tmp_path / "merged"), (os.getpid(),))
    assert isinstance(mounted, Mounted)
    unused: Any = None
    keeper: Any = SimpleNamespace(put=lambda *_: None, drop=lambda _: None)
    each = overlay.Overlay(mounted, overlay.Resources(keeper, unused, unused, unused), "c")
    each.account = Ledger().open_account("overlay")
    each.mounts.add(mounted.id)
    each.save = lambda: None  # type: ignore[method-assign]
    yield each
    while each.held.entries:
        os.close(each.held.take(0)[0])
    mounts.umount(str(tmp_path / "merged"), mounts.MNT_DETACH)


def open_in(each: overlay.Overlay, name: str) -> int:
    return os.open(os.path.join(os.fsdecode(each.mounted.point), name), os.O_RDWR | os.O_CREAT)


def fail(each: overlay.Overlay) -> None:
    assert each.account is not None
    each.account.ledger.record(errno.EIO, 0.0, "probe")


def hold(each: overlay.Overlay) -> None:
    skip = {int(name) for name in os.listdir("/proc") if name.isdigit()} - {os.getpid()}
    assert overlay.hold_open_ones({each.device: each}, Table(), skip) == {}


def answers(each: overlay.Overlay, fds: list[int]) -> list[int]:
    told: list[int] = []
    for fd in fds:
        while not each.judge(os.getpid(), fd, None, lambda code: told.append(code) is None):
            hold(each)
    return told


def test_who_swaps_its_file_as_soon_as_it_is_told_has_not_had_the_other_told(real: overlay.Overlay) -> None:
    """While not all are known: what is remembered as told is what was told."""
    one, other = (open_in(real, name) for name in ("one", "other"))
    again = os.dup(one)
    own = os.getpid()
    fail(real)
    assert real.account is not None
    real.account.open()
    real.incomplete = True
    told: list[int] = []

    def swap(code: int) -> bool:
        os.dup2(other, one)
        told.append(code)
        return True

    try:
        real.judge(own, one, None, swap)
        assert told + answers(real, [other, again]) == [errno.EIO, errno.EIO, 0]
        assert [real.held.find(own, fd)[1] for fd in (other, again)] == [True, True]
    finally:
        for fd in (one, other, again):
            os.close(fd)


def test_who_opens_after_the_walk_has_passed_is_told_of_what_fails_before_it_ends(
    real: overlay.Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    fds = [open_in(real, "early")]
    walk = descriptions.walk

    def slow(skip: set[int]) -> Iterator[tuple[int, int, bytes]]:
        yield from walk(skip)
        fds.append(open_in(real, "late"))
        fail(real)

    fail(real)
    try:
        with monkeypatch.context() as during:
            during.setattr(descriptions, "walk", slow)
            hold(real)
        assert [answers(real, fds) for _ in range(2)] == [[errno.EIO] * 2, [0] * 2]
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("asks", ["early", "late"])
def test_who_opens_while_another_is_answered_is_told_of_what_fails_meanwhile(
    real: overlay.Overlay, monkeypatch: pytest.MonkeyPatch, asks: str
) -> None:
    fds = {"early": open_in(real, "early")}
    fail(real)
    hold(real)
    fds["late"] = open_in(real, "late")

    def find(tid: int, fd: int) -> tuple[int, bool]:
        fds["latest"] = open_in(real, "latest")
        fail(real)
        return Held.find(real.held, tid, fd)

    try:
        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(real.held, "find", find)
            assert answers(real, [fds[asks]]) == [errno.EIO]
        assert [answers(real, list(fds.values())) for _ in range(2)] == [[errno.EIO] * 3, [0] * 3]
    finally:
        for fd in fds.values():
            os.close(fd)


def test_an_overlay_that_goes_while_a_walk_begins_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    class Going(Known):
        """Its account is taken away after one look at it."""

        def __init__(self) -> None:
            self.looks = 0
            super().__init__()

        @property
        def account(self) -> Any:
            self.looks += 1
            return self._account if self.looks == 1 else None

        @account.setter
        def account(self, account: Any) -> None:
            self._account = account

        def prune(self, seen: set[int]) -> None:
            pass

    monkeypatch.setattr(descriptions, "walk", lambda skip: iter(()))
    known = Going()
    known.incomplete = True
    overlays: Any = {known.device: known}
    overlay.let_go_of_closed_ones(overlays, Table(), set())
    os.close(known.held.take(0)[0])
