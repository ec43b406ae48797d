"""The kernel gives the device number of an overlay that has ended to the next: nobody is taken for another by it."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from overt.host import mounts
from overt.host.marks import Marks

from .ground import EIO, Ground, descriptors, fail, wait_until
from .member import member, new_syncfs, overlay, syncfs, tmpfs, write
from .test_worker_dies import kill_worker

pytestmark = pytest.mark.root

MANY = 100


def mount_many(at: Path, count: int) -> tuple[set[int], set[int]]:
    """Overlays on a tmpfs, syncfs on each, all unmounted: their numbers, and what syncfs returned."""
    tmpfs(at)
    made = [(at / str(number), overlay(at / str(number))) for number in range(count)]
    answers = {new_syncfs(below / "merged") for below, _ in made}
    for below, _ in made:
        mounts.umount(str(below / "merged"))
    return {device for _, device in made}, answers


def test_a_number_that_another_container_has_used_up_hides_nothing(guarded: Ground, tmp_path: Path) -> None:
    at = tmp_path / "theirs"
    at.mkdir()
    with member(guarded) as other:
        numbers, answers = other.do(mount_many, at, MANY)
        assert answers == {0}
        for _ in range(5):
            container = guarded.container(wait=False)
            if os.stat(container.root).st_dev in numbers:
                break
        else:
            pytest.skip("the kernel gave other numbers")
        assert container.new_syncfs() == 0
        old = container.open()
        container.lose()
        assert [container.new_syncfs(), container.syncfs(old), container.syncfs(old)] == [EIO, EIO, 0]
        fd = container.ask("write", "/precious", b"precious-data-9137".hex(), 1)
        assert container.syncfs(fd) == 0
        assert b"precious-data-9137" in guarded.disk.snapshot(durable=True)


def mount_until(first: Path, second: Path) -> int:
    """Mount and unmount one overlay, then mount another with the same number; the number, or 0 if it is not had."""
    for _ in range(50):
        number = overlay(first)
        if new_syncfs(first / "merged"):
            return -1
        mounts.umount(str(first / "merged"))
        if overlay(second) == number:
            return number
        mounts.umount(str(second / "merged"))
    return 0


@pytest.mark.parametrize("when", ["the same worker", "the next worker"])
def test_an_overlay_that_takes_the_place_of_another_in_its_container_is_told(
    guarded: Ground, tmp_path: Path, when: str
) -> None:
    at = tmp_path / "tmpfs"
    at.mkdir()
    second = Path(guarded.disk.path, "second")
    with member(guarded) as one:
        one.do(tmpfs, at)
        number = one.do(mount_until, at / "first", second)
        if number == 0:
            pytest.skip("the kernel gave other numbers")
        assert number > 0
        if when == "the next worker":
            kill_worker(guarded)
        assert one.do(new_syncfs, second / "merged") == 0
        guarded.disk.fail("data")
        one.do(write, second / "merged" / "victim", guarded.disk.marker)
        fail(guarded.disk)
        assert [one.do(new_syncfs, second / "merged") for _ in range(3)] == [EIO, 0, 0]


def bind(what: Path, at: Path) -> None:
    at.mkdir()
    fd = mounts.clone(str(what))
    try:
        mounts.attach(fd, str(at))
    finally:
        os.close(fd)


def test_another_mount_of_the_same_overlay_has_the_same_account(guarded: Ground, tmp_path: Path) -> None:
    volume = Path(guarded.disk.path, "volume")
    with member(guarded) as one, member(guarded, "other") as other:
        one.do(overlay, volume)
        assert one.do(new_syncfs, volume / "merged") == 0
        guarded.disk.fail("data")
        one.do(write, volume / "merged" / "victim", guarded.disk.marker)
        fail(guarded.disk)
        one.do(bind, volume / "merged", tmp_path / "bound")
        assert [one.do(new_syncfs, tmp_path / "bound"), one.do(new_syncfs, volume / "merged")] == [EIO, 0]
        assert other.do(new_syncfs, Path("/")) == 0


def test_overlays_that_have_ended_are_let_go_while_their_container_lives(guarded: Ground, tmp_path: Path) -> None:
    at = tmp_path / "theirs"
    at.mkdir()
    guard = guarded.guard
    assert guard is not None
    with member(guarded) as one:
        assert one.do(new_syncfs, Path("/")) == 0
        pids = (guard.process.pid, guard.worker)
        before = [descriptors(pid) for pid in pids]
        assert one.do(mount_many, at, 20)[1] == {0}
        wait_until(lambda: guard.status()["overlays"] == [], "they are let go", 15)
        with suppress(AssertionError):
            wait_until(lambda: [descriptors(pid) for pid in pids] <= before, "", 5)
        assert all(descriptors(pid) <= then for pid, then in zip(pids, before, strict=True))
        assert list(at.glob("*/.overt-guard-*")) == []
        assert (guard.status()["crashes"], guard.worker) == (0, pids[1])


def test_a_mark_keeps_nothing_and_goes_with_its_superblock(guarded: Ground) -> None:
    """Host only; on the machine's kernel."""
    below = Path(guarded.disk.path, "marked")
    marks = Marks()
    try:
        first = overlay(below)
        assert first not in marks.left()
        marks.put(os.fsencode(below / "merged"))
        assert first in marks.left()
        fd = os.open(below / "merged", os.O_RDONLY)
        assert syncfs(fd) == 0
        mounts.umount(str(below / "merged"), mounts.MNT_DETACH)
        assert first in marks.left()
        os.close(fd)
        assert first not in marks.left()
        for _ in range(50):
            again = overlay(below)
            assert again not in marks.left()
            mounts.umount(str(below / "merged"))
            if again == first:
                break
    finally:
        marks.close()
