"""Rules 7 and 8: a volatile mount flushes nothing, and after an error every question has one answer, everywhere."""

import mmap
import os
from collections.abc import Callable

import pytest

from .container import make_read_only
from .scene import EIO, PAGE, Overlay, Scene, fsync, syncfs, told

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

Stage = Callable[..., Scene]
PATIENT = {"ext4": "commit=300", "btrfs": "commit=300", "xfs": ""}


@pytest.fixture
def quiet(stage: Stage, filesystem: str) -> Callable[..., Scene]:
    """A scene whose filesystem does not write its journal by the clock."""
    return lambda off="": stage(filesystem, off=off, mount_options=PATIENT[filesystem])


class Quiet:
    """What the disk has seen, from now on."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.flushes = scene.disk.counters().flushes

    def holds(self) -> bool:
        """No flush reached the disk, and none of the data did."""
        disk = self.scene.disk
        return disk.counters().flushes == self.flushes and disk.marker not in disk.snapshot()


def every_question(overlay: Overlay) -> None:
    """Everything that makes an ordinary mount flush, but mappings and RWF_DSYNC."""
    fd = overlay.write("file")
    overlay.new_fsync("file")
    fsync(fd)
    told(os.fdatasync, fd)
    syncfs(fd)
    overlay.new_syncfs()
    for flag in (os.O_SYNC, os.O_DSYNC):
        synchronous = overlay.open("file", os.O_RDWR | flag)
        os.pwrite(synchronous, overlay.scene.page, PAGE)
    os.mkdir(overlay.target / "directory")
    overlay.new_fsync("directory")


def nothing_flushes(scene: Scene, extra: str = "") -> None:
    overlay = scene.overlay(extra, volatile=True)
    quiet = Quiet(scene)
    every_question(overlay)
    assert quiet.holds()


@pytest.mark.parametrize("extra", ["", "nopassthrough"])
def test_no_question_makes_anything_flush(quiet: Callable[..., Scene], extra: str) -> None:
    nothing_flushes(quiet(), extra)


@pytest.mark.parametrize("off", ["volatile_quiet", "volatile_open"])
def test_with_an_answer_that_flushes_or_a_synchronous_backing_file_it_does(
    quiet: Callable[..., Scene], off: str
) -> None:
    with pytest.raises(AssertionError, match="holds"):
        nothing_flushes(quiet(off))


def test_neither_mounting_nor_unmounting_flushes(quiet: Callable[..., Scene]) -> None:
    scene = quiet()
    watch = Quiet(scene)
    overlay = scene.overlay(volatile=True)
    scene.close(overlay.write("file"))
    record = overlay.umount()
    assert watch.holds()
    assert record["volatile"]
    assert not record["flushed"]


def test_unmounting_does_not_flush_where_an_ordinary_overlay_was_before(quiet: Callable[..., Scene]) -> None:
    scene = quiet()
    overlay, ordinary = scene.overlay(volatile=True), scene.overlay()
    ordinary.umount()
    watch = Quiet(scene)
    scene.close(overlay.write("file"))
    overlay.umount()
    assert watch.holds()


def test_a_copy_up_does_not_flush(quiet: Callable[..., Scene]) -> None:
    scene = quiet()
    (scene.lower / "file").write_bytes(scene.page)
    overlay = scene.overlay(volatile=True)
    watch = Quiet(scene)
    fd = overlay.open("file", os.O_RDWR)
    os.pwrite(fd, b"more", PAGE)
    assert fsync(fd) == 0
    assert watch.holds()


PASSTHROUGH = pytest.mark.parametrize(
    ("extra", "flushes"), [("", True), ("nopassthrough", False)], ids=["passthrough", "nopassthrough"]
)


@PASSTHROUGH
def test_msync_and_rwf_dsync_reach_a_passthrough_file_without_us(
    quiet: Callable[..., Scene], extra: str, flushes: bool
) -> None:
    """Measured, and said in docs/contract.md: the kernel does not ask."""
    scene = quiet()
    for way in (_msync, _rwf_dsync):
        overlay = scene.overlay(extra, volatile=True)
        watch = Quiet(scene)
        way(overlay)
        assert (scene.disk.counters().flushes > watch.flushes) == flushes, way.__name__
        assert (scene.disk.marker in scene.disk.snapshot()) == flushes, way.__name__


def _msync(overlay: Overlay) -> None:
    fd = overlay.write("file", data=bytes(PAGE))
    with mmap.mmap(fd, PAGE) as page:
        page[:] = overlay.scene.page
        page.flush()


def _rwf_dsync(overlay: Overlay) -> None:
    fd = overlay.write("file", data=bytes(PAGE))
    os.pwritev(fd, [overlay.scene.page], 0, os.RWF_DSYNC)


# Rule 8


def says_eio_for_ever(scene: Scene) -> None:
    (scene.lower / "lower-file").write_bytes(b"lower")
    volatile = [scene.overlay(volatile=True) for _ in range(3)]
    ordinary = scene.overlay()
    fds = {}
    for number, overlay in enumerate(volatile):
        overlay.write("file", data=b"x")
        fds[number] = [overlay.open(), overlay.open("file"), overlay.open("lower-file")]
    scene.close(volatile[0].lose())
    assert scene.host_syncfs() == EIO
    assert ordinary.new_syncfs() == EIO
    for _ in range(5):
        for number, overlay in enumerate(volatile):
            assert [syncfs(fd) for fd in fds[number]] == [EIO, EIO, EIO]
            assert [fsync(fd) for fd in fds[number]] == [EIO, EIO, EIO]
            assert told(os.fdatasync, fds[number][1]) == EIO
            assert [overlay.new_syncfs(), overlay.new_fsync("file"), overlay.new_fsync("lower-file")] == [EIO, EIO, EIO]
            assert overlay.new_fsync(".") == EIO
        assert ordinary.new_syncfs() == 0
    assert scene.host_syncfs() == 0


def test_after_an_error_every_question_in_every_container_is_answered_with_eio_for_ever(scene: Scene) -> None:
    says_eio_for_ever(scene)


def test_without_the_check_it_is_not(stage: Stage, filesystem: str) -> None:
    with pytest.raises(AssertionError, match="=="):
        says_eio_for_ever(stage(filesystem, off="volatile_check"))


@pytest.mark.parametrize("off", ["tracing", "fuseblk"])
def test_it_needs_neither_the_tracepoint_nor_syncfs_from_the_kernel(stage: Stage, off: str) -> None:
    scene = stage("ext4", off=off)
    overlay, other = scene.overlay(volatile=True), scene.overlay(volatile=True)
    fd, first = other.write("file", data=b"x"), overlay.lose()
    assert [fsync(first), fsync(first), fsync(fd), fsync(fd)] == [EIO] * 4
    if off == "tracing":
        assert [overlay.new_syncfs(), overlay.new_syncfs(), other.new_syncfs()] == [EIO] * 3


def test_an_error_of_the_host_or_of_an_ordinary_neighbour_counts(scene: Scene) -> None:
    volatile, ordinary = scene.overlay(volatile=True), scene.overlay()
    ordinary.lose()
    assert [volatile.new_syncfs(), volatile.new_fsync("."), volatile.new_syncfs()] == [EIO, EIO, EIO]


def test_a_read_only_container_is_told(ext4: Scene) -> None:
    overlay = ext4.overlay(volatile=True)
    container = ext4.container(make_read_only(str(overlay.target)), pid_namespace=True)
    overlay.lose()
    fd = container.open(overlay.target)
    assert [container.syncfs(fd), container.fsync(fd), container.syncfs(fd)] == [EIO, EIO, EIO]


@pytest.mark.parametrize("extra", ["", "nopassthrough"])
def test_writing_still_works_and_says_nothing(ext4: Scene, extra: str) -> None:
    """As on kernel overlayfs: write, close and msync are not asked by rule 8."""
    overlay = ext4.overlay(extra, volatile=True)
    fd = overlay.lose()
    assert syncfs(fd) == EIO
    assert os.pwrite(fd, b"more", 0) == 4
    os.close(os.open(overlay.target / "new", os.O_CREAT | os.O_WRONLY))
