"""One container opens more files than the guard may hold: others are told as ever, it is told once too often."""

import os
import resource
import time
from collections import Counter
from pathlib import Path

import pytest

from overt.guard.room import Room
from overt.host import mounts

from .ground import EIO, Ground, Guard, wait_until
from .member import member, new_syncfs, overlay, syncfs, tmpfs

pytestmark = pytest.mark.root

LIMIT = ("setpriv", "--bounding-set=-sys_resource", "prlimit", "--nofile=1024:1024")
MANY = 1500
KEPT: list[int] = []


def open_many(path: Path, count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + 100, count + 100))
    KEPT.extend(os.open(path, os.O_RDONLY) for _ in range(count))


def ask(count: int) -> dict[int, int]:
    """What syncfs returns on the first of them."""
    return Counter(map(syncfs, KEPT[:count]))


def close_all_but(count: int) -> None:
    while len(KEPT) > count:
        os.close(KEPT.pop())


def test_who_opens_thousands_of_files_takes_nothing_from_others(bare: Ground) -> None:
    guard = bare.guard = Guard(bare.base / "guard", prefix=LIMIT)
    volume = Path(bare.disk.path, "volume")
    good = bare.container()
    old = good.open()
    with member(bare, "greedy") as greedy:
        greedy.do(overlay, volume)
        assert greedy.do(new_syncfs, volume / "merged") == 0
        greedy.do(open_many, volume / "merged", MANY)
        good.lose()
        assert [good.syncfs(old), good.syncfs(old), good.new_syncfs()] == [EIO, 0, 0]
        (event,) = guard.events("not all known")
        assert event["overlay"] == str(volume / "upper")

        begun = time.monotonic()
        late = bare.container()
        assert late.new_syncfs() == 0
        assert time.monotonic() - begun < 20

        assert greedy.do(ask, MANY, seconds=120) == {EIO: MANY}
        assert greedy.do(ask, 10) == {0: 10}  # but these are told no more
        greedy.do(close_all_but, 10)
        wait_until(lambda: greedy.do(new_syncfs, volume / "merged") == 0, "all are known again", 40)
        assert greedy.do(ask, 10) == {0: 10}
    assert len(guard.events("worker ended")) == 0
    assert guard.status()["crashes"] == 0


def test_what_is_not_all_known_is_on_record_for_the_next_worker(bare: Ground) -> None:
    guard = bare.guard = Guard(bare.base / "guard", prefix=LIMIT)
    volume = Path(bare.disk.path, "volume")
    container = bare.container()
    with member(bare, "greedy") as greedy:
        greedy.do(overlay, volume)
        assert greedy.do(new_syncfs, volume / "merged") == 0
        greedy.do(open_many, volume / "merged", 300)
        container.lose()
        assert greedy.do(new_syncfs, volume / "merged") == EIO
        guard.kill_worker()
        assert greedy.do(ask, 300, seconds=60) == {EIO: 300}


def mount_all(at: Path, count: int) -> list[int]:
    """Overlays on a tmpfs, which stay: what syncfs on each returns."""
    tmpfs(at)
    answers = []
    for number in range(count):
        overlay(at / str(number))
        answers.append(new_syncfs(at / str(number) / "merged"))
    return answers


def unmount_all(at: Path, count: int) -> None:
    for number in range(count):
        mounts.umount(str(at / str(number) / "merged"))


def test_who_mounts_many_overlays_gets_errors_for_those_that_are_too_many(bare: Ground, tmp_path: Path) -> None:
    guard = bare.guard = Guard(bare.base / "guard", prefix=LIMIT)
    most = Room(1024).overlays
    container = bare.container()
    at = tmp_path / "theirs"
    at.mkdir()
    with member(bare, "greedy") as greedy:
        answers = greedy.do(mount_all, at, most + 10)
        assert (answers[0], answers[most:], set(answers)) == (0, [EIO] * 10, {0, EIO})
        assert container.new_syncfs() == 0
        assert bare.container().new_syncfs() == 0
        greedy.do(unmount_all, at, most + 10)
        assert greedy.do(mount_all, at, 3) == [0, 0, 0]
    assert (guard.status()["crashes"], guard.events("worker ended")) == (0, [])


def test_each_container_has_a_share_and_some_room_is_left() -> None:
    room = Room(1600)
    assert [room.take("one") for _ in range(101)] == [True] * 100 + [False]
    assert [room.take("one", told=True) for _ in range(26)] == [True] * 25 + [False]
    room.give("one")
    assert [room.take("one", told=True), room.take("one"), room.take("one")] == [False, True, False]
    room.give("one", told=True)
    assert [room.take("one", told=True), room.take("one", told=True)] == [True, False]
    taken = sum(room.take(f"c-{number}") for number in range(100) for _ in range(100))
    assert taken == 800 - 125


def test_neither_process_has_to_make_its_table_of_descriptors_larger_while_it_serves(guarded: Ground) -> None:
    assert guarded.guard is not None
    for pid in (guarded.guard.process.pid, guarded.guard.worker):
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        size = next(int(line.split()[1]) for line in status if line.startswith("FDSize:"))
        assert size >= min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 1 << 14)
