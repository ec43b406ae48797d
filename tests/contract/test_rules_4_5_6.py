"""Rules 4, 5 and 6: a new error is told again, an old one is not told, and the host is not robbed.

With the tracepoint (`probes+trace`) and without it (`probes`), where the second error has to be paid for: the first is
taken from the host, and that is on record.
"""

import os
import time
from collections.abc import Callable

import pytest

from .scene import EIO, Scene, fsync, syncfs

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

Stage = Callable[..., Scene]


@pytest.fixture(params=["", "tracing"], ids=["trace", "no-trace"])
def watched(request: pytest.FixtureRequest, stage: Stage, filesystem: str) -> Scene:
    """A scene whose server sees the upper with the tracepoint, or without."""
    scene = stage(filesystem, off=request.param)
    scene.overlay().umount()
    return scene


# Rule 4


def test_a_new_error_is_told_again(watched: Scene) -> None:
    overlays = [watched.overlay() for _ in range(2)]
    old = [overlay.open() for overlay in overlays]
    for _ in range(4):
        fd = overlays[0].lose()
        assert [syncfs(other) for other in old] == [EIO, EIO]
        assert [overlay.new_syncfs() for overlay in overlays] == [0, 0]
        assert [syncfs(other) for other in old] == [0, 0]
        assert [fsync(fd), fsync(fd)] == [EIO, 0]


def test_a_new_error_is_told_to_who_was_told_and_once_to_who_was_not(watched: Scene) -> None:
    overlay = watched.overlay()
    asks, waits = overlay.open(), overlay.open()
    overlay.lose()
    assert syncfs(asks) == EIO
    overlay.lose()
    assert [syncfs(asks), syncfs(waits), syncfs(asks), syncfs(waits)] == [EIO, EIO, 0, 0]


def told_in_one_and_again_in_the_other(scene: Scene) -> None:
    """Two errors; the first overlay asks after each, the second after both: to it they are one, as errseq has it."""
    first, second = scene.overlay(), scene.overlay()
    first.lose()
    assert first.new_syncfs() == EIO
    first.lose()
    assert [first.new_syncfs(), first.new_syncfs()] == [EIO, 0]
    assert [second.new_syncfs(), second.new_syncfs()] == [EIO, 0]


def test_two_errors_are_told_in_one_overlay_and_in_the_other(watched: Scene) -> None:
    told_in_one_and_again_in_the_other(watched)


# Rule 5


def is_not_told_of_the_past(scene: Scene) -> None:
    before = scene.overlay()
    before.lose()
    assert before.new_syncfs() == EIO
    after, volatile = scene.overlay(), scene.overlay(volatile=True)
    assert [after.new_syncfs(), volatile.new_syncfs()] == [0, 0]
    assert any("before this mount" in line for line in scene.notices)
    after.lose()
    assert [after.new_syncfs(), after.new_syncfs(), volatile.new_syncfs(), before.new_syncfs()] == [EIO, 0, EIO, EIO]


def test_an_error_from_before_the_mount_is_not_told_to_it(watched: Scene) -> None:
    is_not_told_of_the_past(watched)


def test_without_a_baseline_it_is(stage: Stage, filesystem: str) -> None:
    with pytest.raises(AssertionError, match=r"== \[0, 0\]"):
        is_not_told_of_the_past(stage(filesystem, off="baseline"))


def test_an_error_that_nobody_has_looked_at_is_not_told_to_a_mount_made_after_it(watched: Scene) -> None:
    before = watched.overlay()
    before.lose()
    after = watched.overlay()
    assert [after.new_syncfs(), before.new_syncfs(), before.new_syncfs()] == [0, EIO, 0]


def test_an_error_from_before_the_first_mount_is_not_told(watched: Scene) -> None:
    """Nobody has seen it, and there was no overlay when it happened. What comes after it is told."""
    (watched.root / "host-file").write_bytes(watched.page)
    watched.fail()
    overlay, volatile = watched.overlay(), watched.overlay(volatile=True)
    assert [overlay.new_syncfs(), volatile.new_syncfs(), overlay.new_syncfs()] == [0, 0, 0]
    overlay.lose()
    assert [overlay.new_syncfs(), overlay.new_syncfs(), volatile.new_syncfs()] == [EIO, 0, EIO]


def test_a_file_whose_own_error_nobody_was_told_of_tells_it_at_fsync_in_a_new_mount_too(ext4: Scene) -> None:
    """The file's cursor is the upper's. Silence would be worse: this file's data is lost."""
    before = ext4.overlay()
    ext4.close(before.lose())
    before.umount()
    ext4.again(before)
    assert [before.new_syncfs(), before.new_fsync("victim"), before.new_fsync("victim")] == [0, EIO, 0]


# Rule 6


def leaves_it_to_the_host(scene: Scene) -> None:
    overlays = [scene.overlay() for _ in range(2)]
    volatile = scene.overlay(volatile=True)
    witness = scene.host_fd()
    fd = overlays[0].lose()
    for overlay in (*overlays, volatile):
        assert overlay.new_syncfs() == EIO
    assert fsync(fd) == EIO
    assert scene.server.upper_status()["taken_from_host"] == 0
    assert [scene.host_syncfs(), scene.host_syncfs()] == [EIO, 0]
    assert [syncfs(witness), syncfs(witness)] == [EIO, 0]


def test_the_host_is_told_after_all_containers_were(scene: Scene) -> None:
    leaves_it_to_the_host(scene)


def test_with_a_cursor_in_place_of_the_probes_it_is_not(stage: Stage, filesystem: str) -> None:
    with pytest.raises(AssertionError):
        leaves_it_to_the_host(stage(filesystem, off="eyes"))


def test_the_host_is_told_even_if_there_was_a_second_error(scene: Scene) -> None:
    """To the host the two are one, nobody having looked in between; the tracepoint tells them apart for us."""
    overlay = scene.overlay()
    witness = scene.host_fd()
    for _ in range(2):
        overlay.lose()
        assert [overlay.new_syncfs(), overlay.new_syncfs()] == [EIO, 0]
    assert [scene.host_syncfs(), scene.host_syncfs(), syncfs(witness)] == [EIO, 0, EIO]
    assert scene.server.upper_status()["taken_from_host"] == 0


def test_mounting_over_an_unseen_error_does_not_take_it_from_the_host(scene: Scene) -> None:
    (scene.root / "host-file").write_bytes(scene.page)
    scene.fail()
    scene.overlay()
    scene.overlay(volatile=True)
    assert [scene.host_syncfs(), scene.host_syncfs()] == [EIO, 0]


def test_without_the_tracepoint_what_is_taken_from_the_host_is_on_record(stage: Stage, filesystem: str) -> None:
    """Unsolved there: a host program that opens the upper afterwards is not told; one that had it open is."""
    scene = stage(filesystem, off="tracing")
    overlay = scene.overlay()
    witness = scene.host_fd()
    overlay.lose()
    assert overlay.new_syncfs() == EIO
    assert [scene.host_syncfs(), syncfs(witness)] == [0, EIO]
    status = scene.server.upper_status()
    assert status["eyes"] == "probes"
    assert status["taken_from_host"] == 1
    assert [error["taken"] for error in status["errors"]] == [True]
    assert any(event["taken_from_host"] for event in scene.events("upper error"))


@pytest.mark.parametrize("off", ["", "tracing", "eyes", "eyes_but_tracing"])
def test_whatever_the_upper_is_seen_with_every_overlay_is_told_once_of_each_error(stage: Stage, off: str) -> None:
    """`probes+trace`, `probes`, `cursor`, `trace`: rules 2 and 4 hold with each."""
    scene = stage("ext4", off=off)
    overlays = [scene.overlay() for _ in range(3)]
    old = [overlay.open() for overlay in overlays]
    for _ in range(3):
        overlays[1].lose()
        for overlay, fd in zip(overlays, old, strict=True):
            assert [overlay.new_syncfs(), syncfs(fd), syncfs(fd), overlay.new_syncfs()] == [EIO, EIO, 0, 0]


def test_time_passes_and_nothing_is_forgotten(ext4: Scene) -> None:
    overlay = ext4.overlay()
    old = overlay.open()
    overlay.lose()
    time.sleep(0.5)
    os.close(os.open(overlay.target, os.O_RDONLY))
    assert syncfs(old) == EIO
