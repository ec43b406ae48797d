"""One server, several disks: one that hangs keeps only those who use it."""

import os
import shutil
import signal
import stat
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from overt.host import files, mounts
from overt.lab import bounded

from .conftest import Servers
from .container import Container
from .scene import Overlay, Scene, open_scene, wait_until

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
def test_a_mount_that_is_kept_again_and_again_is_served_in_between(stage: Stage) -> None:
    """While a look-up keeps it, copies that others have made for it are done, and wait for it to be let go."""
    sick, well = stage("ext4"), stage("ext4")
    for number in range(4):
        (sick.lower / f"large-{number}").write_bytes(os.urandom(1 << 20))
    ill = with_files(sick)
    patients = [sick.container() for _ in range(3)]
    healthy, neighbour = well.overlay(), well.container()
    for number in range(4):
        before = sick.server.client.status()["leaders_replaced"]
        forget_what_was_read(sick)
        sick.disk.hang()
        try:
            patients[0].begin("open", str(ill.target / f"large-{number}"), os.O_RDWR)  # which copies it up, and flushes
            patients[1].begin("open", str(ill.target / "directory" / f"a-file-with-a-long-name-{number}"), os.O_RDONLY)
            assert patients[1].waits(0.3)
            patients[2].begin("open", str(ill.target / "directory"), os.O_RDONLY)
            for name in range(3):
                neighbour.begin("open", str(healthy.target / f"new-{number}-{name}"), CREATE)
                assert not neighbour.waits(SOON), "somebody else's disk keeps us"
                assert neighbour.end() > 0
        finally:
            sick.disk.resume()
        assert all(patient.end() > 0 for patient in patients)
        assert sick.server.client.status()["leaders_replaced"] > before
        still_served(patients[0], ill)


@pytest.mark.timeout(90)
@pytest.mark.skipif(not shutil.which("fuse-overlayfs"), reason="no fuse-overlayfs, which is the layer that hangs")
def test_a_layer_whose_server_is_stopped_costs_its_own_mount_and_no_other(servers: Servers) -> None:
    """It is no disk, and may never answer: whoever waits goes free when the watchdog's patience is over."""
    server = servers.start("patience")
    with open_scene("ext4", server) as scene:
        (scene.lower / "directory").mkdir()
        below = scene.base / "below"
        below.mkdir()
        layer = subprocess.Popen(["fuse-overlayfs", "-f", "-o", f"lowerdir={scene.lower}", below])
        try:
            wait_until(lambda: os.path.ismount(below), "the layer is mounted")
            overlay, options = scene.make()
            server.client.mount(str(overlay.target), options.replace(str(scene.lower), str(below)))
            patient = scene.container()
            healthy = scene.overlay()
            layer.send_signal(signal.SIGSTOP)
            patient.begin("open", str(overlay.target / "directory" / "file"), os.O_RDONLY)
            assert patient.waits(0.5)
            (healthy.target / "file").write_text("x")
            assert not patient.waits(20)
            assert patient.end() < 0
            wait_until(lambda: scene.events("given up"), "it is said, a moment after that")
            assert [event["mount"] for event in scene.events("given up")] == [str(overlay.target)]
            (healthy.target / "file").write_text("y")
        finally:
            layer.send_signal(signal.SIGCONT)
            mounts.umount(overlay.target, mounts.MNT_DETACH)
            mounts.umount(below, mounts.MNT_DETACH)
            layer.kill()
            layer.wait()
    server.stop()


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


# The end


def has_ended(pid: int) -> bool:
    """Whether a process is over, but for threads of it that wait for a disk."""
    return " (zombie)" in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.timeout(60)
def test_a_server_that_ends_unmounts_what_is_not_on_the_disk_that_hangs_and_is_not_kept_by_it(servers: Servers) -> None:
    server = servers.start("closing")
    with open_scene("ext4", server) as sick, open_scene("ext4", server) as well:
        ill, healthy = [sick.overlay() for _ in range(2)], [well.overlay() for _ in range(3)]
        for overlay in (*ill, *healthy):
            overlay.scene.close(overlay.write("file"))
        sick.disk.hang()
        try:
            begun = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not any(os.path.ismount(each.target) for each in healthy), "they are unmounted", SOON)
            assert well.disk.marker in well.disk.snapshot(durable=True)
            wait_until(lambda: has_ended(server.pid), "the server ends within its bound")
            assert 2 <= time.monotonic() - begun < 10
            assert not server.socket.exists()
        finally:
            sick.disk.resume()
            for overlay in ill:
                mounts.umount(overlay.target, mounts.MNT_DETACH)
            sick.overlays.clear()
            well.overlays.clear()
        assert server.process.wait(SOON) == 1
        server.client.close()
        log = server.log.read_text()
        assert all(f"{overlay.target}: no answer from its disk: may be lost" in log for overlay in ill)


def at_work(place: Path, name: str, rounds: int) -> None:
    """Make, change, sync, rename and remove files, alone in a directory and beside others; look at each result."""
    own = place / name
    own.mkdir()
    for number in range(rounds):
        path = own / f"file-{number}"
        fd = os.open(path, CREATE, 0o600)
        os.pwrite(fd, name.encode(), 0)
        if number % 3 == 0:
            os.fsync(fd)
        if number % 20 == 0:
            files.syncfs(fd)
        os.close(fd)
        shared = place / f"{name}-{number}"
        os.rename(path, shared)
        assert shared.read_bytes() == name.encode()
        assert stat.S_IMODE(shared.stat().st_mode) == 0o600
        if number % 2:
            os.unlink(shared)
        with open(place / f"lower-{number % 50}", "ab") as file:  # somebody copies it up
            file.write(b"x")
    assert sorted(os.listdir(own)) == []
    assert len([entry for entry in os.listdir(place) if entry.startswith(f"{name}-")]) == (rounds + 1) // 2


@pytest.mark.timeout(120)
def test_the_loop_may_change_hands_at_any_moment(stage: Stage) -> None:
    scene = stage("ext4", off="restless")
    for number in range(50):
        (scene.lower / f"lower-{number}").write_bytes(b"y" * 5000)
    overlays = [scene.overlay() for _ in range(2)]
    before = scene.server.client.status()["leaders_replaced"]
    children = [(overlay, f"worker{number}") for overlay in overlays for number in range(3)]
    pids = []
    for overlay, name in children:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                at_work(overlay.target, name, 200)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    assert [bounded.wait(pid, 100) for pid in pids] == [0] * len(pids)
    for overlay in overlays:
        sizes = {(overlay.target / f"lower-{number}").stat().st_size for number in range(50)}
        assert sizes == {5000 + 3 * 4}
    assert scene.server.client.status()["leaders_replaced"] - before > 20
