"""Rule 2 where the superblock is read-only (U25), which the kernel asks nothing (fs/sync.c, sync_filesystem)."""

import ctypes
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest

from overt.host import mounts
from overt.host.libc import libc
from overt.server import caller

from .scene import EIO, Overlay, Scene, syncfs, told, wait_until

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

Stage = Callable[..., Scene]
MS_REMOUNT = 32


def remount(overlay: Overlay, *, read_only: bool) -> None:
    """mount -o remount,ro or remount,rw, as mount(8) without overt's helper makes it."""
    bits = MS_REMOUNT | (mounts.MOUNT_ATTR_RDONLY if read_only else 0)
    code = libc.mount(None, os.fsencode(overlay.target), None, bits, None)
    assert code == 0, os.strerror(ctypes.get_errno())


def remount_by_descriptor(overlay: Overlay, flag: str = "ro") -> None:
    """The same by fsconfig(2), as newer ones make it: the place stays writable, and only the superblock changes."""
    fd = os.open(overlay.target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mounts.reconfigure(fd, flag)
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


def test_unsolved_an_error_after_the_remount_is_told_when_it_is_writable_again(scene: Scene) -> None:
    overlay, other = scene.overlay(), scene.overlay()
    early = overlay.open()
    remount(overlay, read_only=True)
    other.lose()
    assert [other.new_syncfs(), other.new_syncfs()] == [EIO, 0]
    assert [syncfs(early), overlay.new_syncfs()] == [0, 0], "solved: say so in docs/contract.md"
    remount(overlay, read_only=False)
    assert [syncfs(early), overlay.new_syncfs()] == [EIO, 0]


def test_a_remount_without_an_error_tells_nobody_of_anything(ext4: Scene) -> None:
    overlay = ext4.overlay()
    old = overlay.open()
    for read_only in (True, False, True):
        remount(overlay, read_only=read_only)
        assert [syncfs(old), overlay.new_syncfs()] == [0, 0]
    assert superblock_is(overlay, "ro")


_HAMMER = """
import os, sys, time
path, words = sys.argv[1], sys.stdin.fileno()
if sys.argv[2] == "relative":
    os.chdir(os.path.dirname(path))
    path = os.path.basename(path)
print("ready", flush=True)
os.read(words, 1)
os.set_blocking(words, False)
flags, opened, other = os.O_RDWR, 0.0, set()
if sys.argv[2] == "create":
    flags |= os.O_CREAT
while True:
    began = time.monotonic()
    try:
        fd = os.open(path, flags, 0o600)
        if os.pread(fd, 1, 0) == b"-":
            os.pwrite(fd, b"THROUGH", 0)
        os.close(fd)
        opened = began
    except OSError as error:
        other.add(error.errno)
    try:
        if not os.read(words, 1):
            break
    except BlockingIOError:
        pass
print(opened, *other)
"""


class Hammer:
    """Processes of root that do nothing but try to open a file for writing. They say when they last could."""

    def __init__(self, overlay: Overlay) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", _HAMMER, str(overlay.target / name), kind],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for kind, name in [("absolute", "file"), ("relative", "file"), ("create", "new")]
        ]  # fmt: skip
        for process in self.processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def begin(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

    def stop(self) -> tuple[float, set[int]]:
        """When a file was last asked for that was then opened (time.monotonic()), and the errnos otherwise."""
        words = [process.communicate(timeout=30)[0].split() for process in self.processes]
        return max(float(when) for when, *_ in words), {int(word) for _, *more in words for word in more}


def remount_amid(overlay: Overlay, hammer: Hammer) -> float:
    """Remount it read-only by descriptor; when that is under way they begin. When it was done, by time.monotonic()."""
    own = threading.get_native_id()
    done = threading.Event()

    def when_it_waits() -> None:
        while not caller.of(own).is_remount and not done.wait(1e-4):
            pass
        hammer.begin()

    begin = threading.Thread(target=when_it_waits)
    begin.start()
    try:
        remount_by_descriptor(overlay)
        return time.monotonic()
    finally:
        done.set()
        begin.join()


def hammered(scene: Scene, *, rounds: int) -> None:
    """Errors and remounts, and all the time somebody tries to open files for writing."""
    overlay = scene.overlay()
    scene.close(overlay.write("file", data=b"data"))
    kept = overlay.open()
    for _ in range(rounds):
        scene.close(overlay.lose())
        with Hammer(overlay) as hammer:
            scene.close(overlay.write("much", data=bytes(16 << 20)))  # so that the remount takes a while
            since = remount_amid(overlay, hammer)
            names = set(os.listdir(overlay.upper))
            assert [syncfs(kept), overlay.new_syncfs()] == [EIO, 0]
            time.sleep(1.0)
            remount_twice = told(remount_by_descriptor, overlay)
            time.sleep(1.0)
            last, errnos = hammer.stop()
        assert last < since, "somebody got through"
        assert set(os.listdir(overlay.upper)) == names
        assert errnos <= {errno.EROFS} and remount_twice in (0, errno.EBUSY)
        settled(overlay)
        time.sleep(0.1)
        assert told(overlay.write, "more") == errno.EROFS
        remount(overlay, read_only=False)
        scene.close(overlay.write("more"))
        assert overlay.new_syncfs() == 0


def test_however_many_keep_opening_for_writing_none_gets_through_and_it_ends_read_only(ext4: Scene) -> None:
    hammered(ext4, rounds=4)


def test_unless_the_server_refuses_changes_somebody_gets_through(stage: Stage) -> None:
    with pytest.raises(AssertionError, match="got through"):
        hammered(stage("ext4", off="refusing"), rounds=8)


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


def at_once(scene: Scene, writable: Callable[[Overlay], None]) -> None:
    """Read-only, and writable again right afterwards: before, while, and after it is made read-only again."""
    overlay = scene.overlay()
    for number in range(40):
        scene.close(overlay.lose())
        wait_until(lambda: told(remount_by_descriptor, overlay) == 0, "it is remounted")  # EBUSY: see docs/contract.md
        time.sleep(number % 8 * 5e-4)
        writable(overlay)
        for _ in range(3):
            assert superblock_is(overlay, "rw"), number
            time.sleep(0.01)
        assert told(os.mkdir, overlay.target / f"directory-{number}") == 0
        assert [overlay.new_syncfs(), overlay.new_syncfs()] == [EIO, 0]


def by_mount(overlay: Overlay) -> None:
    remount(overlay, read_only=False)


def by_descriptor(overlay: Overlay) -> None:
    remount_by_descriptor(overlay, "rw")


@pytest.mark.parametrize("writable", [by_mount, by_descriptor])
def test_whoever_makes_it_writable_at_once_has_the_last_word(ext4: Scene, writable: Callable[[Overlay], None]) -> None:
    at_once(ext4, writable)


def test_unless_the_server_looks_who_remounts_he_does_not(stage: Stage) -> None:
    with pytest.raises(AssertionError):
        at_once(stage("ext4", off="overtaking"), by_mount)


@pytest.mark.parametrize("writable", [by_mount, by_descriptor])
def test_amid_attempts_to_write_too(ext4: Scene, writable: Callable[[Overlay], None]) -> None:
    overlay = ext4.overlay()
    ext4.close(overlay.write("file", data=b"data"))
    ext4.close(overlay.lose())
    with Hammer(overlay) as hammer:
        ext4.close(overlay.write("much", data=bytes(16 << 20)))
        remount_amid(overlay, hammer)
        time.sleep(0.5)
        writable(overlay)
        since = time.monotonic()
        assert told(os.mkdir, overlay.target / "directory") == 0
        time.sleep(0.5)
        last, errnos = hammer.stop()
    assert last > since and errnos <= {errno.EROFS}
    assert superblock_is(overlay, "rw")


def test_without_another_thread_the_remount_ends_and_the_error_is_told_when_it_is_writable(stage: Stage) -> None:
    scene = stage("ext4", off="threads")
    overlay = scene.overlay()
    scene.close(overlay.lose())
    remount(overlay, read_only=True)
    assert superblock_is(overlay, "ro")
    remount(overlay, read_only=False)
    scene.close(overlay.write("more"))
    assert [overlay.new_syncfs(), overlay.new_syncfs()] == [EIO, 0]


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

    threads = [threading.Thread(target=which) for which in (ask, toggle, toggle)]
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
