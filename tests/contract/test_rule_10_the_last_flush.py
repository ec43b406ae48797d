"""Rule 10, and whoever unmounts: what was written is on the disk then, and an error of that flush is known."""

import mmap
import os
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from overt.host import mounts
from overt.server.watchdog import abort

from .conftest import Servers
from .container import place
from .scene import EIO, PAGE, Overlay, Scene, open_scene, run_overt, syncfs, wait_until
from .test_many_disks import SOON, has_ended
from .test_rule_1_durable import pages_in

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

Stage = Callable[..., Scene]


def umount(overlay: Overlay, flags: int = 0) -> None:
    """umount(2): nobody asks overt."""
    mounts.umount(str(overlay.target), flags)
    overlay.scene.overlays.remove(overlay)


def in_the_tree(overlay: Overlay) -> bool:
    """Whether it is mounted; asked without a look at it, which would keep it busy."""
    return f" {overlay.target} " in Path("/proc/self/mountinfo").read_text()


def on_the_disk(scene: Scene) -> bool:
    return scene.disk.marker in scene.disk.snapshot(durable=True)


def said(overlay: Overlay, event: str = "unmounted") -> dict[str, Any]:
    """The verdict, which is said a moment after whoever unmounts has gone on; once."""
    scene, name = overlay.scene, str(overlay.target)
    wait_until(lambda: [each for each in scene.events("gone") if each["mount"] == name], "the server has let go of it")
    (found,) = [each for kind in ("unmounted", "aborted") for each in scene.events(kind) if each["mount"] == name]
    assert found["event"] == event
    return found


def outcome(overlay: Overlay, event: str = "unmounted") -> tuple[str, bool, list[str]]:
    record = said(overlay, event)
    return record["verdict"], record["flushed"], record.get("files", [])


# What was written is on the disk


def unmounted_by_somebody(scene: Scene, extra: str = "") -> None:
    overlay, other = scene.overlay(extra), scene.overlay()
    scene.close(overlay.write("file"))
    flushes = scene.disk.counters().flushes
    umount(overlay)
    assert on_the_disk(scene)
    assert scene.disk.counters().flushes > flushes
    assert outcome(overlay) == ("no error recorded", True, [])
    other.umount()


@pytest.mark.parametrize("extra", ["", "nopassthrough"])
def test_umount_by_somebody_else_leaves_what_was_written_on_the_disk(scene: Scene, extra: str) -> None:
    unmounted_by_somebody(scene, extra)


def test_without_the_last_flush_it_is_not_there(stage: Stage, filesystem: str) -> None:
    with pytest.raises(AssertionError, match="on_the_disk"):
        unmounted_by_somebody(stage(filesystem, off="last_flush"))


def test_so_does_the_last_mount_of_an_upper(scene: Scene) -> None:
    overlay = scene.overlay()
    scene.close(overlay.write("file"))
    umount(overlay)
    assert on_the_disk(scene)
    assert outcome(overlay) == ("no error recorded", True, [])


@pytest.mark.parametrize("extra", ["", "nopassthrough"])
def test_and_what_was_written_through_a_mapping(scene: Scene, extra: str) -> None:
    overlay, _ = scene.overlay(extra), scene.overlay()
    fd = overlay.write("file", data=b"")
    os.truncate(fd, 64 * PAGE)
    with mmap.mmap(fd, 64 * PAGE) as mapping:
        for number in range(64):
            mapping[number * PAGE : number * PAGE + 16] = scene.disk.marker
    scene.close(fd)
    umount(overlay)
    assert pages_in(scene.disk.snapshot(durable=True), scene.disk.marker) == 64


@pytest.mark.parametrize("program", ["umount", "fusermount3"])
def test_the_programs_that_people_call_do(ext4: Scene, program: str) -> None:
    overlay, _ = ext4.overlay(), ext4.overlay()
    ext4.close(overlay.write("file"))
    words = ["umount"] if program == "umount" else ["fusermount3", "-u"]
    with suppress(FileNotFoundError):
        subprocess.run([*words, str(overlay.target)], check=True, timeout=30)
        ext4.overlays.remove(overlay)
        assert on_the_disk(ext4)
        assert outcome(overlay) == ("no error recorded", True, [])
        return
    pytest.skip(f"no {program}")


def test_lazily_it_is_flushed_when_the_last_file_is_closed(scene: Scene) -> None:
    overlay, _ = scene.overlay(), scene.overlay()
    fd = overlay.write("file", data=b"")
    umount(overlay, mounts.MNT_DETACH)
    os.pwrite(fd, scene.page, 0)
    assert scene.events("unmounted") == []
    scene.close(fd)
    assert on_the_disk(scene)
    assert outcome(overlay) == ("no error recorded", True, [])


def test_with_a_container_that_is_killed_goes_its_mount_and_that_is_flushed(scene: Scene) -> None:
    other = scene.overlay()
    fd, overlay = scene.detached()
    container = scene.container(place(fd, str(overlay.target)))
    scene.close(fd)
    assert container.write(overlay.target / "file", scene.page) == 0
    scene.containers.remove(container)
    container.close()
    assert on_the_disk(scene)
    overlay.target = overlay.target.with_name(f"{overlay.target.name}-nowhere")
    assert outcome(overlay) == ("no error recorded", True, [])
    other.umount()


def test_a_plain_fuse_mount_is_flushed_in_its_own_time(stage: Stage, filesystem: str) -> None:
    """The kernel does not wait for such a server."""
    scene = stage(filesystem, off="fuseblk")
    overlay, other = scene.overlay(), scene.overlay()
    scene.close(overlay.write("file"))
    umount(overlay)
    assert outcome(overlay) == ("no error recorded", True, [])
    assert on_the_disk(scene)
    scene.close(other.write("file", data=os.urandom(PAGE)))
    assert other.umount()["verdict"] == "no error recorded"
    assert outcome(other) == ("no error recorded", True, [])


def test_a_mount_whose_connection_is_aborted_is_flushed(scene: Scene) -> None:
    overlay, _ = scene.overlay(), scene.overlay()
    scene.close(overlay.write("file"))
    abort(os.lstat(overlay.target).st_dev)
    assert outcome(overlay, "aborted") == ("no error recorded", True, [])
    assert on_the_disk(scene)
    umount(overlay)


def test_by_force_it_is_flushed_afterwards(ext4: Scene) -> None:
    """umount -f aborts the connection before it unmounts."""
    overlay, _ = ext4.overlay(), ext4.overlay()
    ext4.close(overlay.write("file"))
    umount(overlay, mounts.MNT_FORCE)
    assert outcome(overlay, "aborted") == ("no error recorded", True, [])
    assert on_the_disk(ext4)


def test_a_volatile_mount_is_not_flushed(scene: Scene) -> None:
    """Another overlay keeps the filesystem in use, whose own last flush would be somebody else's."""
    overlay, _ = scene.overlay(volatile=True), scene.overlay(volatile=True)
    scene.close(overlay.write("file"))
    flushes = scene.disk.counters().flushes
    umount(overlay)
    assert outcome(overlay) == ("no error recorded", False, [])
    assert not on_the_disk(scene)
    assert scene.disk.counters().flushes == flushes


# An error of that flush


def a_last_flush_that_fails(scene: Scene) -> None:
    overlay, other = scene.overlay(), scene.overlay()
    old = other.open()
    scene.close(overlay.write("victim"))
    scene.disk.fail("data")
    umount(overlay)
    scene.disk.heal()
    assert outcome(overlay) == ("lost", True, ["/victim"])
    assert [syncfs(old), other.new_syncfs(), syncfs(old)] == [EIO, 0, 0]
    assert len(scene.events("upper error")) == 1


def test_an_error_of_the_last_flush_is_said_and_every_other_overlay_is_told(scene: Scene) -> None:
    a_last_flush_that_fails(scene)


def test_also_where_a_fresh_probe_has_to_be_mounted_for_it(stage: Stage, filesystem: str) -> None:
    """Whoever unmounts waits meanwhile, and so does the last process of a namespace that goes."""
    scene = stage(filesystem, off="tracing")
    fd, nowhere = scene.detached()
    container = scene.container(place(fd, str(nowhere.target)))
    scene.close(fd)
    overlay, other = scene.overlay(), scene.overlay()
    scene.close(overlay.write("victim"))
    scene.disk.fail("data")
    umount(overlay)
    assert outcome(overlay) == ("may be lost", True, [])
    assert [other.new_syncfs(), other.new_syncfs()] == [EIO, 0]
    assert container.write(nowhere.target / "victim", scene.page) == 0
    scene.containers.remove(container)
    container.close()
    scene.disk.heal()
    nowhere.target = nowhere.target.with_name(f"{nowhere.target.name}-nowhere")
    assert outcome(nowhere) == ("may be lost", True, [])
    assert [other.new_syncfs(), other.new_syncfs()] == [EIO, 0]


def test_without_that_flush_nobody_hears_of_it(stage: Stage, filesystem: str) -> None:
    with pytest.raises(AssertionError):
        a_last_flush_that_fails(stage(filesystem, off="last_flush"))


def test_an_error_under_the_last_mount_of_an_upper_is_said(scene: Scene) -> None:
    overlay = scene.overlay()
    scene.close(overlay.write("victim"))
    scene.disk.fail("data")
    umount(overlay)
    scene.disk.heal()
    assert outcome(overlay) == ("lost", True, ["/victim"])
    assert len(scene.events("upper error")) == 1


def test_a_device_that_cannot_flush_is_may_be_lost(scene: Scene) -> None:
    overlay, other = scene.overlay(), scene.overlay()
    old = other.open()
    scene.close(overlay.write("file", data=os.urandom(PAGE)))
    scene.disk.fail("flush")
    umount(overlay)
    scene.disk.heal()
    record = said(overlay)
    assert (record["verdict"], record["flushed"]) == ("may be lost", False)
    assert syncfs(old) == EIO
    scene.close(old)
    with suppress(Exception):  # the upper may be dead for good
        other.umount()


def test_a_volatile_mount_says_whether_there_was_an_error(ext4: Scene) -> None:
    overlay, _ = ext4.overlay(volatile=True), ext4.overlay()
    ext4.close(overlay.lose())
    umount(overlay)
    assert outcome(overlay) == ("lost", False, ["/victim"])


# What it costs, and whom it keeps


def test_overt_umount_says_it_once_and_flushes_no_more_than_it_must(scene: Scene) -> None:
    """Once while the mount is still there, so that little is left to do; and once when nobody can write any more."""
    overlay, _ = scene.overlay(), scene.overlay()
    scene.close(overlay.write("file"))
    device = scene.upper_device()
    before = scene.server.upper_status(device)["flushes"]
    record = overlay.umount()
    assert scene.server.upper_status(device)["flushes"] - before == 2
    assert said(overlay).items() >= record.items()


def test_a_mount_that_comes_to_nothing_is_not_flushed_and_not_said_to_be_unmounted(ext4: Scene) -> None:
    ext4.overlay()
    before = ext4.server.upper_status(ext4.upper_device())["flushes"]
    overlay, options = ext4.make()
    overlay.target.rmdir()
    overlay.target.touch()
    with pytest.raises(Exception, match="not a directory"):
        ext4.server.client.mount(str(overlay.target), options)
    fd, nowhere = ext4.detached()
    assert ext4.events("unmounted") == []
    assert ext4.server.upper_status(ext4.upper_device())["flushes"] == before
    ext4.close(fd)
    nowhere.target = nowhere.target.with_name(f"{nowhere.target.name}-nowhere")
    assert outcome(nowhere) == ("no error recorded", True, [])


class Unmounting(threading.Thread):
    """umount(2) by somebody else, who waits."""

    def __init__(self, overlay: Overlay) -> None:
        super().__init__(target=umount, args=(overlay,), daemon=True)
        self.start()

    def waits(self, seconds: float) -> bool:
        self.join(seconds)
        return self.is_alive()


def test_a_disk_that_hangs_keeps_only_who_unmounts_what_is_on_it(stage: Stage) -> None:
    sick, well = stage("ext4"), stage("ext4")
    neighbour = well.container()
    ill, healthy, staying = sick.overlay(), well.overlay(), well.overlay()
    sick.close(ill.write("file"))
    well.close(healthy.write("file"))
    sick.disk.hang(20)
    try:
        patient = Unmounting(ill)
        assert patient.waits(0.5)
        begun = time.monotonic()
        umount(healthy)
        assert on_the_disk(well)
        assert os.listdir(staying.target) == []
        well.close(staying.write("new", data=b"x"))
        assert well.server.client.status()["pid"] == well.server.pid
        assert time.monotonic() - begun < SOON
        assert patient.waits(0)
    finally:
        sick.disk.resume()
    assert not patient.waits(SOON)
    assert on_the_disk(sick)
    assert outcome(ill) == ("no error recorded", True, [])
    neighbour.close()
    well.containers.remove(neighbour)


def test_and_for_a_while_only(stage: Stage) -> None:
    scene = stage("ext4", off="unmounting")
    overlay, _ = scene.overlay(), scene.overlay()
    scene.close(overlay.write("file"))
    scene.disk.hang(30)
    try:
        begun = time.monotonic()
        umount(overlay)
        assert 1.9 < time.monotonic() - begun < 2 + SOON
    finally:
        scene.disk.resume()
    record = said(overlay)
    assert (record["verdict"], record["flushed"]) == ("may be lost", False)
    assert record["why"] == "no answer from its disk in 2 s"


@pytest.mark.parametrize("by", ["umount(2)", "overt umount"])
def test_a_server_that_ends_lets_go_who_unmounts_and_waits_for_a_disk(servers: Servers, by: str) -> None:
    """If it is a thread of its own, nobody else could answer it any more."""
    server = servers.start("closing,first_flush")
    with open_scene("ext4", server) as scene:
        overlay, other = scene.overlay(), scene.overlay()
        for each in (overlay, other):
            scene.close(each.write("file"))
        scene.disk.hang(40)
        try:
            if by == "umount(2)":
                patient = Unmounting(overlay)
            else:
                patient = threading.Thread(target=lambda: run_overt("umount", str(overlay.target)), daemon=True)
                patient.start()
            wait_until(lambda: not in_the_tree(overlay), "it has left the tree", SOON)
            patient.join(0.5)
            assert patient.is_alive()
            server.process.terminate()
            if by == "umount(2)":
                patient.join(15)
                assert not patient.is_alive()
            wait_until(lambda: has_ended(server.pid), "the server ends")
        finally:
            scene.disk.resume()
            scene.overlays.clear()
        assert server.process.wait(SOON) == 1
        patient.join(SOON)
        assert not patient.is_alive()
        with suppress(OSError):
            mounts.umount(other.target, mounts.MNT_DETACH)
        server.client.close()


def test_a_server_that_is_killed_while_it_unmounts_does_not_wait_for_itself(servers: Servers) -> None:
    """Its thread in umount(2) keeps the connection open for whose answer it waits; the watchdog ends that."""
    server = servers.start("patience,first_flush")
    with open_scene("ext4", server) as scene:
        overlay = scene.overlay()
        scene.close(overlay.write("file"))
        scene.disk.hang(40)
        try:
            patient = threading.Thread(target=lambda: run_overt("umount", str(overlay.target)), daemon=True)
            patient.start()
            wait_until(lambda: not in_the_tree(overlay), "it has left the tree", SOON)
            time.sleep(0.5)
            server.process.kill()
            time.sleep(SOON)
        finally:
            scene.disk.resume()
            scene.overlays.clear()
        assert server.process.wait(2 * SOON) < 0
        patient.join(SOON)
        assert not patient.is_alive()
        server.client.close()


# A mount that is somewhere else as well


def test_a_mount_that_lives_on_elsewhere_has_no_verdict_yet(ext4: Scene) -> None:
    overlay, _ = ext4.overlay(), ext4.overlay()
    container = ext4.container()
    done = run_overt("umount", str(overlay.target))
    ext4.overlays.remove(overlay)
    assert (done.returncode, done.stdout) == (3, "still mounted elsewhere\n")
    assert not os.path.ismount(overlay.target)
    (left,) = ext4.events("left")
    assert (left["elsewhere"], left["flushed"], left["mount"]) == (True, True, str(overlay.target))
    assert container.write(overlay.target / "victim", ext4.page) == 0
    ext4.fail()
    ext4.containers.remove(container)
    container.close()
    assert outcome(overlay) == ("lost", True, ["/victim"])


def test_what_was_lost_so_far_is_said_of_it(ext4: Scene) -> None:
    overlay = ext4.overlay()
    ext4.container()
    ext4.close(overlay.lose())
    done = run_overt("umount", str(overlay.target))
    ext4.overlays.remove(overlay)
    assert (done.returncode, done.stdout) == (3, "lost: /victim (still mounted elsewhere)\n")
