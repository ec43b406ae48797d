"""Rule 3: fsync and fdatasync tell each descriptor of the file once; so do a mapping and O_SYNC; directories too."""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from overt.host.libc import libc
from overt.lab import Disk

from .scene import EIO, PAGE, Scene, fsync, syncfs, told

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

Stage = Callable[..., Scene]


def each_descriptor_is_told_once(scene: Scene, extra: str = "") -> None:
    overlay = scene.overlay(extra)
    overlay.write("victim", data=b"x")
    reader = overlay.open("victim")
    data_only = overlay.open("victim", os.O_WRONLY)
    writer = overlay.lose()
    shared = scene.keep(os.dup(writer))
    assert [fsync(reader), fsync(writer), told(os.fdatasync, data_only)] == [EIO, EIO, EIO]
    assert [fsync(shared), fsync(reader), fsync(writer), told(os.fdatasync, data_only)] == [0, 0, 0, 0]
    assert overlay.new_fsync("victim") == 0


@pytest.mark.parametrize("extra", ["", "nopassthrough"])
def test_each_descriptor_is_told_once(scene: Scene, extra: str) -> None:
    each_descriptor_is_told_once(scene, extra)


def test_with_one_descriptor_in_the_server_for_all_one_of_them_is(stage: Stage, filesystem: str) -> None:
    with pytest.raises(AssertionError, match="== "):
        each_descriptor_is_told_once(stage(filesystem, off="own_descriptors"))


@pytest.mark.parametrize("extra", ["", "nopassthrough"])
def test_a_new_descriptor_is_told_if_nobody_was(scene: Scene, extra: str) -> None:
    overlay = scene.overlay(extra)
    scene.close(overlay.lose())
    assert [overlay.new_fsync("victim"), overlay.new_fsync("victim")] == [EIO, 0]


def test_bystanders_are_not_told(scene: Scene) -> None:
    victim, other = scene.overlay(), scene.overlay()
    fds = [victim.write("bystander", data=b"x"), other.write("bystander", data=b"x"), other.open()]
    victim.lose()
    assert [fsync(fd) for fd in fds] == [0, 0, 0]


def test_syncfs_and_fsync_each_tell_and_do_not_take_from_each_other(scene: Scene) -> None:
    overlay = scene.overlay()
    for first, second in ((syncfs, fsync), (fsync, syncfs)):
        fd = overlay.lose()
        assert [first(fd), second(fd), first(fd), second(fd)] == [EIO, EIO, 0, 0]


# Copy-up


def counts_from_the_copy_up(scene: Scene, extra: str = "") -> None:
    """U15: what the file's new copy loses is told to who had opened the old one."""
    (scene.lower / "victim").write_bytes(b"lower")
    overlay = scene.overlay(extra)
    old = [overlay.open("victim"), overlay.open("victim")]
    assert fsync(old[0]) == 0
    overlay.lose()
    assert [fsync(old[0]), fsync(old[0]), fsync(old[1]), fsync(old[1])] == [EIO, 0, EIO, 0]


@pytest.mark.parametrize("extra", ["", "nopassthrough"])
def test_a_descriptor_opened_before_copy_up_counts_from_the_copy_up(scene: Scene, extra: str) -> None:
    counts_from_the_copy_up(scene, extra)


def test_without_reopening_at_copy_up_it_does_not(stage: Stage, filesystem: str) -> None:
    with pytest.raises(AssertionError, match="== "):
        counts_from_the_copy_up(stage(filesystem, off="reopening_files"))


def test_a_file_that_only_a_lower_layer_has_has_nothing_to_lose(scene: Scene) -> None:
    (scene.lower / "file").write_bytes(b"lower")
    overlay = scene.overlay()
    fd = overlay.open("file")
    overlay.lose()
    assert [fsync(fd), overlay.new_fsync("file")] == [0, 0]


# Mappings and O_SYNC


@pytest.mark.parametrize("extra", ["", "nopassthrough"])
def test_msync_is_told(scene: Scene, extra: str) -> None:
    overlay = scene.overlay(extra)
    fd = overlay.write("victim", data=bytes(PAGE))
    assert fsync(fd) == 0
    with mmap.mmap(fd, PAGE) as page:
        page[:] = scene.page
        scene.disk.fail("data")
        code = told(page.flush)
        scene.disk.heal()
        assert code == EIO
        assert told(page.flush) == 0
    # With passthrough the mapping is the layer's file, with a cursor of its own: fsync tells of it once more.
    assert fsync(fd) == (0 if extra else EIO)


def test_msync_is_told_of_what_happened_before_it(scene: Scene) -> None:
    overlay = scene.overlay()
    fd = overlay.write("victim", data=bytes(PAGE))
    with mmap.mmap(fd, PAGE) as page:
        page[:] = scene.page
        scene.fail()
        assert [told(page.flush), told(page.flush)] == [EIO, 0]


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC], ids=["O_SYNC", "O_DSYNC"])
@pytest.mark.parametrize("extra", ["", "nopassthrough"])
def test_a_synchronous_write_is_told(scene: Scene, extra: str, flag: int) -> None:
    overlay = scene.overlay(extra)
    fd = overlay.open("victim", os.O_RDWR | os.O_CREAT | flag)
    assert os.pwrite(fd, b"good", PAGE) == 4
    scene.disk.fail("data")
    assert told(os.pwrite, fd, scene.page, 0) == EIO
    scene.disk.heal()
    assert told(os.pwrite, fd, b"good again", PAGE) == 0


def test_a_synchronous_write_is_on_the_device(scene: Scene) -> None:
    overlay = scene.overlay()
    fd = overlay.open("file", os.O_RDWR | os.O_CREAT | os.O_SYNC)
    os.pwrite(fd, scene.page, 0)
    assert scene.disk.marker in scene.disk.snapshot(durable=True)


# Directories


def a_directory_reaches_the_device(scene: Scene, path: Path) -> None:
    """A file that is in the directory when the power fails after its fsync."""
    overlay = scene.overlay()
    os.mkdir(overlay.target / "directory")
    fd = overlay.open("directory")
    overlay.write("directory/file", data=b"x")
    assert fsync(fd) == 0
    scene.disk.snapshot(path, durable=True)
    with Disk(scene.disk.filesystem, image=path) as after:
        assert os.path.exists(f"{after.path}/{overlay.upper.name}/directory/file")


PATIENT = {"ext4": "commit=300", "btrfs": "commit=300", "xfs": ""}
"""mount options with which the filesystem does not write a journal of its own accord while a test runs"""


def test_fsync_of_a_directory_makes_its_entries_durable(stage: Stage, filesystem: str, tmp_path: Path) -> None:
    a_directory_reaches_the_device(stage(filesystem, mount_options=PATIENT[filesystem]), tmp_path / "image")


def test_answering_without_the_upper_does_not(stage: Stage, filesystem: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exists"):
        scene = stage(filesystem, off="directory_fsync", mount_options=PATIENT[filesystem])
        a_directory_reaches_the_device(scene, tmp_path / "image")


def a_directory_that_is_lost_is_told(scene: Scene) -> None:
    overlay = scene.overlay()
    os.mkdir(overlay.target / "directory")
    fd = overlay.open("directory")
    overlay.write("directory/file", data=b"x")
    scene.disk.fail("write")
    code = fsync(fd)
    scene.disk.heal()
    assert code == EIO


def test_a_directory_block_that_cannot_be_written_is_told(stage: Stage) -> None:
    """ext4 without a journal writes the directory's block in place."""
    a_directory_that_is_lost_is_told(stage("ext4-nojournal"))


def test_a_directory_block_is_not_told_if_nobody_asks_the_upper(stage: Stage) -> None:
    with pytest.raises(AssertionError, match="=="):
        a_directory_that_is_lost_is_told(stage("ext4-nojournal", off="directory_fsync"))


@pytest.mark.parametrize("extra", ["", "nopassthrough"])
def test_sync_file_range_says_nothing_and_takes_nothing(scene: Scene, extra: str) -> None:
    """U20: the FUSE inode has no dirty pages of its own, as the inode of kernel overlayfs has none."""
    overlay = scene.overlay(extra)
    fd = overlay.lose()
    all_three_flags = 7
    assert libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), all_three_flags) == 0
    assert [fsync(fd), fsync(fd)] == [EIO, 0]


def test_a_full_disk_found_at_fsync_is_named_as_what_it_is(stage: Stage) -> None:
    scene = stage("ext4")
    overlay = scene.overlay()
    fd = overlay.write("victim")
    scene.disk.fail("data", errno=errno.ENOSPC)
    scene.disk.push()
    scene.disk.heal()
    assert [fsync(fd), fsync(fd)] == [errno.ENOSPC, 0]
    assert overlay.new_syncfs() in (errno.ENOSPC, EIO)
