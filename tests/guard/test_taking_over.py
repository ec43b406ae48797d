"""A worker takes over from another, whatever has become of an overlay, its disk, or our directory there."""

import fcntl
import os
import struct
import threading
from pathlib import Path

import pytest

from overt.errseq import SEEN
from overt.guard.overlay import Overlay, Resources
from overt.guard.records import Records
from overt.guard.store import Entry, Keeper
from overt.guard.table import Mounted
from overt.lab import Disk
from overt.upper import Uppers

from .ground import EIO, Ground, descriptors, fail, wait_until
from .member import member, new_syncfs, overlay, write

pytestmark = pytest.mark.root

XFS_IOC_GOINGDOWN = 0x8004587D
NOLOGFLUSH = 2
KEPT: list[int] = []


def replace_worker(ground: Ground) -> None:
    """Kill it, and do not ask anybody whether there is another."""
    assert ground.guard is not None
    before = len(ground.guard.events("worker ended"))
    ground.guard.kill_worker()
    guard = ground.guard
    wait_until(lambda: len(guard.events("worker ended")) > before, "the worker has ended")


def lock(below: Path) -> None:
    """Keep a lock on the guard's directory, as any container can whose volume it is on."""
    (directory,) = below.glob(".overt-guard-*")
    KEPT.append(os.open(directory, os.O_RDONLY))
    fcntl.flock(KEPT[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_on_the_directory_of_the_guard_keeps_no_worker_from_coming(guarded: Ground) -> None:
    volume = Path(guarded.disk.path, "volume")
    container = guarded.container()
    old = container.open()
    with member(guarded) as one:
        one.do(overlay, volume)
        assert one.do(new_syncfs, volume / "merged") == 0
        one.do(lock, volume)
        replace_worker(guarded)
        assert container.syncfs(old) == 0
        guarded.disk.fail("data")
        one.do(write, volume / "merged" / "victim", guarded.disk.marker)
        fail(guarded.disk)
        assert [one.do(new_syncfs, volume / "merged") for _ in range(2)] == [EIO, 0]
        assert [container.syncfs(old), container.syncfs(old)] == [EIO, 0]
    assert guarded.guard is not None
    assert guarded.guard.status()["generation"] == 2


def shut_down(disk: Disk) -> None:
    fd = os.open(disk.path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, XFS_IOC_GOINGDOWN, struct.pack("=I", NOLOGFLUSH))
    finally:
        os.close(fd)


def test_a_filesystem_that_has_shut_down_keeps_no_worker_from_coming_and_is_let_go(guarded: Ground) -> None:
    guard = guarded.guard
    assert guard is not None
    container = guarded.container()
    old = container.open()
    with Disk("xfs", size=320 << 20) as second:
        before = descriptors(guard.process.pid)
        dead = guarded.container(disk=second)
        fd = dead.open()
        assert dead.syncfs(fd) == 0
        shut_down(second)
        assert dead.syncfs(fd) == EIO
        replace_worker(guarded)
        assert container.syncfs(old) == 0
        assert dead.syncfs(fd) == EIO
        guarded.end(dead)
        wait_until(lambda: len(guard.status()["uppers"]) == 1, "the dead disk is let go")
        wait_until(lambda: descriptors(guard.process.pid) <= before, "nothing is kept of it")
        assert len(guard.events("left behind")) == 1
        assert (guard.status()["crashes"], guard.events("internal error")) == (0, [])
        assert guard.status()["generation"] == 2


class Silent(Keeper):
    def __init__(self) -> None:
        self.dropped: list[str] = []

    def put(self, name: str, value: object, fds: object = ()) -> None:
        pass

    def drop(self, name: str) -> None:
        self.dropped.append(name)


@pytest.fixture
def left(guarded: Ground) -> Entry:
    """What is left of an overlay that was told of one error and is owed another; its descriptors are the test's."""
    scratch = Path(guarded.disk.path, "scratch")
    scratch.mkdir()
    fds = tuple(os.open(path, os.O_RDONLY) for path in (guarded.disk.path, scratch, guarded.disk.path))
    account = {"mounted_at": 0, "reached": 1, "cursor": EIO | SEEN, "told": 1, "spared": [], "left_out": 0}
    value = {
        "mounted": [7, "/", "/u", "/w", False], "party": "c", "upper": os.stat(scratch).st_dev, "scratch": "scratch",
        "incomplete": False, "account": account,
    }  # fmt: skip
    return Entry(value, fds)


def make(uppers: Uppers) -> tuple[Overlay, Silent]:
    keeper = Silent()
    shared = Resources(keeper, uppers, Records(keeper, None), None)
    return Overlay(Mounted(7, b"/", b"/u", b"/w", volatile=False), shared, "c", "7/1"), keeper


def test_an_overlay_that_cannot_be_taken_over_is_kept_and_answers_nobody(guarded: Ground, left: Entry) -> None:
    """Without eyes on its upper: an account opened anew would not be owed what the old one was."""
    each, keeper = make(Uppers(trace=False))
    with pytest.raises(OSError, match="was not left"):
        each.restore(left, {})
    assert (each.account, keeper.dropped) == (None, [])
    assert each.close() is None
    assert keeper.dropped == ["overlay/7/1"]


def test_taking_over_does_not_wait_for_a_disk_that_hangs(guarded: Ground, left: Entry) -> None:
    """Nor does it flush where, without the tracepoint, an error can be seen by flushing only."""
    first = Uppers(trace=False)
    upper = first.get(left.fds[0], left.fds[1])
    upper.attach("first", volatile=False)
    Path(guarded.disk.path, "victim").write_bytes(guarded.disk.marker * 256)
    fail(guarded.disk)
    upper.check()  # its probe has fired: the next error is seen by flushing only
    carried = upper.carry()
    assert carried is not None
    uppers = Uppers(trace=False)
    uppers.carried[upper.s_dev] = carried
    each, _ = make(uppers)
    Path(guarded.disk.path, "dirty").write_bytes(b"dirty" * 4096)
    guarded.disk.hang()
    try:
        thread = threading.Thread(target=each.restore, args=(left, {}), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
        assert each.account is not None
    finally:
        guarded.disk.resume()
    each.close()
    first.close()
