"""One server, several disks: one that hangs keeps only those who use it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from .container import Container
from .scene import Overlay, Scene

pytestmark = pytest.mark.root

Stage = Callable[..., Scene]
SOON, LATER = 5.0, 1.0
CREATE = os.O_RDWR | os.O_CREAT


def with_files(scene: Scene) -> Overlay:
    """An overlay whose upper has a directory of files."""
    overlay, options = scene.make()
    (overlay.upper / "directory").mkdir()
    for number in range(500):
        (overlay.upper / "directory" / f"a-file-with-a-long-name-{number}").touch()
    scene.server.client.mount(str(overlay.target), options)
    scene.overlays.append(overlay)
    return overlay


def forget_what_was_read(scene: Scene) -> None:
    """What is dirty, or in the journal and nowhere else, stays in the cache: it has to be written first."""
    for _ in range(2):
        assert scene.host_syncfs() == 0
        scene.disk.push()
        Path("/proc/sys/vm/drop_caches").write_text("3")


def a_disk_hangs_in_a_look_up(sick: Scene, well: Scene) -> None:
    ill = [with_files(sick) for _ in range(3)]
    patients = [sick.container() for _ in ill]
    healthy, neighbour = well.overlay(), well.container()
    forget_what_was_read(sick)
    sick.disk.hang()
    try:
        for overlay, patient in zip(ill, patients, strict=True):
            patient.begin("open", str(overlay.target / "directory" / "a-file-with-a-long-name-499"), os.O_RDONLY)
        assert [patient.waits(LATER) or patient.end() for patient in patients] == [True] * len(patients)
        for number in range(20):
            neighbour.begin("open", str(healthy.target / f"new-{number}"), CREATE)
            assert not neighbour.waits(SOON), "somebody else's disk keeps us"
            assert neighbour.end() > 0
        assert all(patient.waits(0) for patient in patients)
    finally:
        sick.disk.resume()
    assert all(patient.end() > 0 for patient in patients)
    for overlay, patient in zip(ill, patients, strict=True):
        still_served(patient, overlay)


def still_served(container: Container, overlay: Overlay) -> None:
    fd = container.open(overlay.target / "own", CREATE)
    assert [container.fsync(fd), container.syncfs(fd)] == [0, 0]
    assert len(os.listdir(overlay.target / "directory")) == 500


@pytest.mark.timeout(90)
def test_a_disk_that_hangs_in_a_look_up_keeps_only_its_own_mounts(stage: Stage) -> None:
    a_disk_hangs_in_a_look_up(stage("ext4"), stage("ext4"))


@pytest.mark.timeout(90)
def test_without_a_lookout_it_keeps_everybody(stage: Stage) -> None:
    with pytest.raises(AssertionError, match="somebody else's disk"):
        a_disk_hangs_in_a_look_up(stage("ext4", off="lookout"), stage("ext4", off="lookout"))


@pytest.mark.timeout(90)
def test_a_disk_that_hangs_in_an_fsync_keeps_not_even_the_other_files_of_that_mount(ext4: Scene) -> None:
    overlay, asking, reading = ext4.overlay(), ext4.container(), ext4.container()
    fd = asking.open(overlay.target / "file", CREATE)
    ext4.close(overlay.write("file", data=b"x"))
    ext4.disk.hang()
    try:
        asking.begin("fsync", fd)
        assert asking.waits(LATER)
        for _ in range(20):
            reading.begin("open", str(overlay.target / "file"), os.O_RDONLY)
            assert not reading.waits(SOON)
            assert reading.end() > 0
        assert asking.waits(0)
    finally:
        ext4.disk.resume()
    assert asking.end() == 0
    still_there = asking.open(overlay.target / "file", CREATE)
    assert [asking.fsync(still_there), asking.syncfs(still_there)] == [0, 0]
