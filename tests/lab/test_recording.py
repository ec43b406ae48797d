"""What a disk was asked, in order, and what it would hold if the power went away in between."""

import os
from collections.abc import Iterator
from contextlib import closing

import pytest

from overt.host import files
from overt.judge.replay import Promise, choose, replay
from overt.lab import Disk
from overt.lab.image import MEANING, Image, Rule
from overt.lab.recording import Recorder, Recording

SIZE = 1 << 20
PAGE = 4096


@pytest.fixture
def recorded() -> Iterator[tuple[Image, Recording]]:
    image = Image(SIZE)
    image.write(0, memoryview(b"before" * 10))
    base, log = os.memfd_create("base"), os.memfd_create("log")
    image.dump(base, durable=False)
    image.recorder = Recorder(log)
    with closing(Recording(base, log)) as recording:
        yield image, recording
        image.recorder.close()


def held(recording: Recording, count: int, left: str, at: int, seed: int = 0) -> bytes:
    fd = recording.contents(recording.requests(), count, left, seed)
    try:
        return os.pread(fd, 4, at)
    finally:
        os.close(fd)


def test_a_moment_has_what_was_acknowledged_and_what_was_flushed(recorded: tuple[Image, Recording]) -> None:
    image, recording = recorded
    image.write(PAGE, memoryview(b"one."))
    image.flush()
    image.write(2 * PAGE, memoryview(b"two."))
    image.discard(0, PAGE)
    assert [held(recording, count, "all", PAGE) for count in range(3)] == [bytes(4), b"one.", b"one."]
    assert held(recording, 1, "none", PAGE) == bytes(4)  # not flushed yet
    assert held(recording, 2, "none", PAGE) == b"one."
    assert held(recording, 3, "all", 2 * PAGE) == b"two."
    assert held(recording, 3, "none", 2 * PAGE) == bytes(4)
    assert (held(recording, 3, "all", 0), held(recording, 4, "all", 0)) == (b"befo", bytes(4))


def test_by_chance_some_of_what_was_not_flushed_is_kept_and_the_same_again_by_the_same_seed(
    recorded: tuple[Image, Recording],
) -> None:
    image, recording = recorded
    image.write(PAGE, memoryview(b"kept"))
    image.flush()
    image.write(2 * PAGE, memoryview(b"some"))
    found = [held(recording, 3, "some", 2 * PAGE, seed) for seed in range(20)]
    assert set(found) == {b"some", bytes(4)}
    assert found == [held(recording, 3, "some", 2 * PAGE, seed) for seed in range(20)]
    assert {held(recording, 3, "some", PAGE, seed) for seed in range(20)} == {b"kept"}


def test_what_the_disk_refuses_is_not_recorded(recorded: tuple[Image, Recording]) -> None:
    image, recording = recorded
    image.rules.append(Rule(MEANING["all"], 5, b"", 0, SIZE))
    for call in (lambda: image.write(0, memoryview(b"x")), image.flush, lambda: image.discard(0, PAGE)):
        with pytest.raises(OSError):
            call()
    assert recording.requests() == []


def test_metadata_are_the_writes_without_the_marker() -> None:
    image = Image(SIZE)
    image.rules.append(Rule(MEANING["metadata"], 5, b"MARK", 0, SIZE, without=True))
    image.write(0, memoryview(b"..MARK.."))
    with pytest.raises(OSError):
        image.write(0, memoryview(b"something else"))
    image.flush()


def test_so_many_requests_go_well_first() -> None:
    image = Image(SIZE)
    image.rules.append(Rule(MEANING["flush"], 5, b"", 0, SIZE, skip=2))
    image.write(0, memoryview(b"a write is no flush"))
    image.flush()
    image.flush()
    for _ in range(2):
        with pytest.raises(OSError):
            image.flush()


def test_the_moments_of_all_promises_are_tried(recorded: tuple[Image, Recording]) -> None:
    image, recording = recorded
    promises = []
    for number in range(30):
        image.write(number * PAGE, memoryview(b"x"))
        if number % 7 == 3:
            assert image.recorder
            promises.append(Promise(image.recorder.size, "", {}))
    moments = choose(recording.requests(), promises, 5)
    assert {4, 11, 18, 25} <= set(moments)
    assert 0 not in moments and len(moments) >= 5


@pytest.mark.root
@pytest.mark.timeout(60)
@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs"])
def test_a_promise_kept_and_a_promise_made_too_early_are_told_apart(filesystem: str) -> None:
    early, kept = [], []
    with Disk(filesystem, size=64 << 20) as disk, closing(disk.record()) as recording:
        root = os.open(disk.path, os.O_RDONLY)
        for number in range(5):
            with open(f"{disk.path}/{number}", "wb") as file:
                file.write((f"text {number} ".encode() * PAGE)[:PAGE])
            early.append(Promise(disk.recorded(), ".", {str(number): f"text {number} "}))
            files.syncfs(root)
            kept.append(Promise(disk.recorded(), ".", {str(number): f"text {number} "}))
        os.close(root)
        disk.close()
        count, lost = replay(recording, kept, 20, filesystem)
        assert (count >= 20, lost) == (True, [])
        count, lost = replay(recording, early, 20, filesystem)
        assert lost and "absent" in lost[0]
