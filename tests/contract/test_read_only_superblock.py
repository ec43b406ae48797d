"""Rule 2 where the superblock is read-only (U25), which the kernel asks nothing (fs/sync.c, sync_filesystem)."""

import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from overt.host import mounts
from overt.host.libc import libc

from .scene import EIO, Overlay, Scene, syncfs, told, wait_until

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

Stage = Callable[..., Scene]
MS_REMOUNT = 32


def remount(overlay: Overlay, *, read_only: bool) -> None:
    """mount -o remount,ro or remount,rw, as mount(8) without overt's helper makes it."""
    bits = MS_REMOUNT | (mounts.MOUNT_ATTR_RDONLY if read_only else 0)
    code = libc.mount(None, os.fsencode(overlay.target), None, bits, None)
    assert code == 0, os.strerror(ctypes.get_errno())


def remount_by_descriptor(overlay: Overlay) -> None:
    """The same by fsconfig(2), as newer ones make it: the place stays writable, and only the superblock changes."""
    fd = os.open(overlay.target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mounts.reconfigure(fd, "ro")
    finally:
        os.close(fd)


def superblock_is(overlay: Overlay, flag: str) -> bool:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    (line,) = [line for line in lines if f" {overlay.target} " in line]
    return line.rpartition(" ")[2].split(",")[0] == flag


def settled(overlay: Overlay) -> None:
    """The superblock is read-only for good."""
    wait_until(lambda: superblock_is(overlay, "ro"), "the superblock is read-only again")


def error_before_the_remount(scene: Scene, extra: str = "") -> None:
    overlay = scene.overlay(extra)
    early, waiting = overlay.open(), overlay.open()
    scene.close(overlay.lose())
    assert syncfs(early) == EIO
    scene.close(overlay.lose())
    remount(overlay, read_only=True)
    assert [syncfs(early), syncfs(waiting), overlay.new_syncfs()] == [EIO, EIO, 0]
    assert [syncfs(early), syncfs(waiting), overlay.new_syncfs()] == [0, 0, 0]
    settled(overlay)


@pytest.mark.parametrize("extra", ["", "nopassthrough"])
def test_an_error_from_before_the_remount_is_told_once_on_each_descriptor(scene: Scene, extra: str) -> None:
    error_before_the_remount(scene, extra)


def test_unless_the_superblock_is_reopened_it_is_not(stage: Stage) -> None:
    with pytest.raises(AssertionError, match="== "):
        error_before_the_remount(stage("ext4", off="reopening"))


def test_a_new_descriptor_is_told_right_after_the_remount(scene: Scene) -> None:
    """No call comes between the remount and the setting of the cursor: tried often, as fast as can be."""
    overlay = scene.overlay()
    for number in range(30):
        scene.close(overlay.lose())
        if number % 2:
            remount(overlay, read_only=True)
        else:
            remount_by_descriptor(overlay)
        assert [overlay.new_syncfs(), overlay.new_syncfs()] == [EIO, 0], number
        settled(overlay)
        remount(overlay, read_only=False)


def test_an_error_found_by_the_flush_of_the_remount_itself_is_told(ext4: Scene) -> None:
    overlay = ext4.overlay()
    ext4.close(overlay.write("victim"))
    ext4.disk.fail("data")
    remount(overlay, read_only=True)
    ext4.disk.heal()
    assert [overlay.new_syncfs(), overlay.new_syncfs()] == [EIO, 0]


def test_back_to_writable_nothing_is_told_twice_and_the_next_error_is_told(scene: Scene) -> None:
    overlay, other = scene.overlay(), scene.overlay()
    early, late = overlay.open(), overlay.open()
    scene.close(overlay.lose())
    remount(overlay, read_only=True)
    assert syncfs(early) == EIO
    settled(overlay)
    remount(overlay, read_only=False)
    assert [syncfs(early), syncfs(late), syncfs(late), overlay.new_syncfs()] == [0, EIO, 0, 0]
    assert [other.new_syncfs(), other.new_syncfs()] == [EIO, 0]
    overlay.lose()
    assert [syncfs(early), syncfs(late), overlay.new_syncfs(), other.new_syncfs()] == [EIO, EIO, 0, EIO]


def error_after_the_remount(scene: Scene) -> None:
    overlay, other = scene.overlay(), scene.overlay()
    early = overlay.open()
    remount(overlay, read_only=True)
    later = overlay.open()
    for number in range(1, 4):
        other.lose()
        wait_until(lambda: len(scene.events("told")) == 2 * number - 1, "the cursor is set", 2.0)  # noqa: B023
        settled(overlay)
        assert [syncfs(early), syncfs(later), overlay.new_syncfs(), syncfs(early)] == [EIO, EIO, 0, 0]
        assert [other.new_syncfs(), other.new_syncfs()] == [EIO, 0]


def test_errors_after_the_remount_are_told_too_once_each(scene: Scene) -> None:
    """Nobody asks: an error of the host's, or of another overlay, is noticed all the same."""
    error_after_the_remount(scene)


def test_unless_somebody_looks_they_are_not(stage: Stage) -> None:
    with pytest.raises(AssertionError, match="the cursor is set"):
        error_after_the_remount(stage("ext4", off="watching"))


def test_a_remount_without_an_error_tells_nobody_of_anything(ext4: Scene) -> None:
    overlay = ext4.overlay()
    old = overlay.open()
    for read_only in (True, False, True):
        remount(overlay, read_only=read_only)
        assert [syncfs(old), overlay.new_syncfs()] == [0, 0]
    assert superblock_is(overlay, "ro")


def test_nothing_can_be_changed_while_the_superblock_is_writable_for_a_moment(ext4: Scene) -> None:
    overlay, other = ext4.overlay(), ext4.overlay()
    remount_by_descriptor(overlay)
    done = threading.Event()
    answers: set[int] = set()

    def insist() -> None:
        while not done.is_set():
            answers.add(told(lambda: os.close(os.open(overlay.target / "file", os.O_RDWR | os.O_CREAT, 0o600))))
            answers.add(told(os.mkdir, overlay.target / "directory"))
            answers.add(told(os.chmod, overlay.target, 0o777))

    threads = [threading.Thread(target=insist) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            other.lose()
            wait_until(lambda: overlay.new_syncfs() == EIO, "the error is told")
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert answers == {errno.EROFS}
    assert os.listdir(overlay.target) == []
    settled(overlay)


def test_whoever_makes_it_writable_has_it_writable(ext4: Scene) -> None:
    overlay = ext4.overlay()
    for _ in range(10):
        ext4.close(overlay.lose())
        remount(overlay, read_only=True)
        assert overlay.new_syncfs() == EIO
        settled(overlay)
        remount(overlay, read_only=False)
        ext4.close(overlay.write("more"))
        assert overlay.new_syncfs() == 0


def test_it_is_unmounted_as_ever(ext4: Scene) -> None:
    overlay = ext4.overlay()
    ext4.close(overlay.lose())
    remount(overlay, read_only=True)
    assert overlay.umount()["errors"] == 1
    ext4.again(overlay)


def test_remounts_errors_and_questions_at_once(ext4: Scene) -> None:
    """Nobody waits long, nothing is told twice, and when all is quiet the last error is told."""
    overlay, other = ext4.overlay(), ext4.overlay()
    old = overlay.open()
    done = threading.Event()
    answers: list[int] = []
    slowest = [0.0, 0.0]

    def timed(which: int, call: Callable[[], object]) -> None:
        began = time.monotonic()
        call()
        slowest[which] = max(slowest[which], time.monotonic() - began)

    def ask() -> None:
        while not done.is_set():
            timed(0, lambda: answers.append(syncfs(old)))

    def toggle() -> None:
        bits = [MS_REMOUNT | mounts.MOUNT_ATTR_RDONLY, MS_REMOUNT]
        while not done.is_set():
            timed(1, lambda: libc.mount(None, os.fsencode(overlay.target), None, bits[0], None))
            bits.reverse()
            time.sleep(0.003)

    threads = [threading.Thread(target=ask), threading.Thread(target=toggle)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(60):
            ext4.close(other.lose())
    finally:
        done.set()
        for thread in threads:
            thread.join()
    told_once = answers.count(EIO)
    assert set(answers) <= {0, EIO} and 0 < told_once <= ext4.server.upper_status()["recorded"]
    assert max(slowest) < 5.0, slowest
    remount(overlay, read_only=False)
    syncfs(old)
    assert [syncfs(old), syncfs(old)] == [0, 0]
    ext4.close(other.lose())
    assert [syncfs(old), syncfs(old)] == [EIO, 0]
