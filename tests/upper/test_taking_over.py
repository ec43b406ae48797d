"""A process that goes on with another's eyes: nothing is asked of the upper, and what was known is still known."""

import os
import subprocess
from collections.abc import Iterator
from errno import EIO

import pytest

from overt.host import files
from overt.upper import Upper, Uppers

from .stage import Stage, flush

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]


@pytest.fixture
def next_one() -> Iterator[Uppers]:
    """The uppers of the process that comes next."""
    made = Uppers(trace=False)
    yield made
    made.close()


def take_over(stage: Stage, upper: Upper, uppers: Uppers) -> Upper:
    carried = upper.carry()
    assert carried is not None
    uppers.carried[upper.s_dev] = carried
    fd = os.open(stage.root, os.O_RDONLY)
    try:
        taken = uppers.get(fd, fd, upper.s_dev)
        taken.resume("")
    finally:
        os.close(fd)
    return taken


def test_the_upper_is_asked_nothing(ext4: Stage, next_one: Uppers, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a server that never answers."""
    upper, _ = ext4.attach()

    def ask(*args: object, **options: object) -> None:
        raise AssertionError("the upper is asked")

    with monkeypatch.context() as patch:
        for name in ("fstatvfs", "statvfs", "fsync", "utime", "fstat", "mkdir"):
            patch.setattr(os, name, ask)
        for name in ("syncfs", "openat2"):
            patch.setattr(files, name, ask)
        taken = take_over(ext4, upper, next_one)
    assert flush(taken) is None


def test_an_upper_that_has_turned_read_only_was_not_born_so(btrfs: Stage, next_one: Uppers) -> None:
    """After a transaction that was aborted it answers syncfs with 0: that it is read-only is all there is."""
    upper, _ = btrfs.attach()
    os.mkdir(btrfs.root / "metadata")
    btrfs.disk.fail("flush")
    assert btrfs.host() == EIO
    btrfs.disk.heal()
    failure = flush(take_over(btrfs, upper, next_one))
    assert failure is not None and failure.errno == EIO


def test_an_upper_that_was_born_read_only_is_still_believed(ext4: Stage, next_one: Uppers) -> None:
    subprocess.run(["mount", "-o", "remount,ro", ext4.disk.path], check=True, timeout=30)
    fd = os.open(ext4.root, os.O_RDONLY)
    try:
        upper = ext4.uppers.get(fd, fd)
        upper.attach("", volatile=False)
    finally:
        os.close(fd)
    assert flush(take_over(ext4, upper, next_one)) is None
