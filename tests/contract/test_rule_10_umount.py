"""Rule 10: unmounting is a place where an error can surface, and `overt umount` says what is known."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from overt.host import mounts

from .conftest import Servers
from .scene import EIO, Overlay, Scene, fsync, open_scene, overt_command, run_overt

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

Stage = Callable[..., Scene]


def umount(overlay: Overlay, *options: str) -> tuple[int, str]:
    """Run the command; (exit status, what it printed)."""
    done = run_overt("umount", *options, str(overlay.target))
    assert done.stderr == ""
    overlay.scene.overlays.remove(overlay)
    assert not os.path.ismount(overlay.target)
    return done.returncode, done.stdout.strip()


def test_it_flushes_and_says_that_no_error_was_recorded(scene: Scene) -> None:
    overlay = scene.overlay()
    scene.close(overlay.write("file"))
    assert umount(overlay) == (0, "no error recorded")
    assert scene.disk.marker in scene.disk.snapshot(durable=True)


def test_an_error_that_appears_only_when_it_flushes_is_told(scene: Scene) -> None:
    """U24: nobody asked before; the pages were still in memory."""
    overlay = scene.overlay()
    scene.close(overlay.write("victim"))
    scene.disk.fail("data")
    status, words = umount(overlay)
    scene.disk.heal()
    assert status == 3
    assert words == "lost: /victim"


def test_files_that_are_known_to_be_lost_are_named(scene: Scene) -> None:
    overlay, bystander = scene.overlay(), scene.overlay()
    os.mkdir(overlay.target / "directory")
    scene.close(overlay.lose("directory/victim"))
    assert umount(overlay) == (3, "lost: /directory/victim")
    assert umount(bystander) == (3, "may be lost")


def test_a_file_whose_fsync_was_told_is_named_without_the_tracepoint_too(stage: Stage) -> None:
    scene = stage("ext4", off="tracing")
    overlay = scene.overlay()
    fd = overlay.lose()
    assert overlay.new_fsync("victim") == EIO
    scene.close(fd)
    assert umount(overlay) == (3, "lost: /victim and perhaps more")
    overlay = scene.overlay()
    scene.close(overlay.lose())
    assert umount(overlay) == (3, "may be lost")


def test_of_very_many_lost_files_some_are_named(stage: Stage) -> None:
    scene = stage("ext4", off="naming")
    overlay = scene.overlay()
    for name in "abc":
        fd = overlay.lose(name)
        assert fsync(fd) == EIO
        scene.close(fd)
    assert umount(overlay) == (3, "lost: /a, /b and perhaps more")


def test_an_error_from_before_the_mount_is_none_of_its(scene: Scene) -> None:
    before = scene.overlay()
    scene.close(before.lose())
    after = scene.overlay()
    assert umount(after) == (0, "no error recorded")


def test_a_volatile_mount_says_whether_there_was_an_error_and_that_nothing_was_flushed(scene: Scene) -> None:
    good, bad = scene.overlay(volatile=True), scene.overlay(volatile=True)
    assert umount(good) == (0, "no error recorded (volatile: nothing was flushed)")
    scene.close(bad.lose())
    status, words = umount(bad)
    assert status == 3
    assert words.endswith("(volatile: nothing was flushed)")


def test_the_record_is_also_json_and_an_event(ext4: Scene) -> None:
    overlay = ext4.overlay()
    ext4.close(overlay.lose())
    status, text = umount(overlay, "--json")
    record = json.loads(text)
    assert status == 3
    assert record["verdict"] == "lost"
    assert record["files"] == ["/victim"]
    assert record["errors"] == 1
    assert record["flushed"]
    (event,) = [event for event in ext4.events("unmounted") if event["mount"] == str(overlay.target)]
    assert event.items() >= record.items()


def test_what_is_busy_stays_mounted(ext4: Scene) -> None:
    overlay = ext4.overlay()
    fd = overlay.open()
    done = run_overt("umount", str(overlay.target))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [f"overt: {overlay.target}: Device or resource busy"]
    ext4.close(fd)
    assert umount(overlay) == (0, "no error recorded")


def test_what_is_not_ours_is_refused_in_one_line(ext4: Scene) -> None:
    done = run_overt("umount", str(ext4.base))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [f"overt: {ext4.base}: not an overt mount"]


def test_unmounted_directories_can_be_mounted_again_at_once(scene: Scene) -> None:
    overlay = scene.overlay()
    for _ in range(3):
        overlay.umount()
        scene.again(overlay)


def test_what_somebody_has_mounted_over_it_is_not_unmounted_in_its_place(ext4: Scene) -> None:
    overlay = ext4.overlay()
    fd = mounts.new_mount("tmpfs", [])
    mounts.attach(fd, str(overlay.target))
    os.close(fd)
    (overlay.target / "of-another").touch()
    done = run_overt("umount", str(overlay.target))
    assert done.returncode == 1
    assert "something else is mounted over it" in done.stderr and done.stderr.count("\n") == 1
    assert (overlay.target / "of-another").exists()
    mounts.umount(overlay.target)
    ext4.close(overlay.write("file"))
    assert umount(overlay) == (0, "no error recorded")


def move(source: Path, target: Path) -> None:
    target.mkdir()
    subprocess.run(["mount", "--move", source, target], check=True, timeout=30)


def test_what_was_moved_is_unmounted_where_it_is(ext4: Scene) -> None:
    overlay, old = ext4.overlay(), ext4.base / "mnt-1"
    move(overlay.target, new := ext4.base / "moved")
    done = run_overt("umount", str(old))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{old}: is not there any more (was it moved?): unmount it where it is" in done.stderr
    overlay.target = new
    assert umount(overlay) == (0, "no error recorded")


def test_and_so_is_one_below_a_directory_that_was_renamed(ext4: Scene) -> None:
    overlay, options = ext4.make()
    (above := ext4.base / "above").mkdir()
    overlay.target = overlay.target.rename(above / "mnt")
    ext4.server.client.mount(str(overlay.target), options)
    ext4.overlays.append(overlay)
    above.rename(renamed := ext4.base / "renamed")
    overlay.target = renamed / "mnt"
    ext4.close(overlay.write("file"))
    assert umount(overlay) == (0, "no error recorded")


def test_another_place_of_a_mount_is_not_the_one_to_unmount(ext4: Scene) -> None:
    overlay = ext4.overlay()
    (copy := ext4.base / "copy").mkdir()
    subprocess.run(["mount", "--bind", overlay.target, copy], check=True, timeout=30)
    done = run_overt("umount", str(copy))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "another place of an overt mount" in done.stderr
    mounts.umount(copy)
    assert umount(overlay) == (0, "no error recorded")


def test_a_server_that_ends_unmounts_what_was_moved(servers: Servers) -> None:
    server = servers.start()
    with open_scene("ext4", server) as scene:
        overlay, other = scene.overlay(), scene.overlay()
        move(overlay.target, new := scene.base / "moved")
        move(other.target, scene.base / "moved too")
        _, options = scene.make()
        server.client.mount(str(overlay.target), options)
        assert server.stop() == 0
        assert not any(os.path.ismount(path) for path in (new, overlay.target, scene.base / "moved too"))
        scene.overlays.clear()


def test_who_cannot_print_the_record_has_unmounted(ext4: Scene) -> None:
    reading, unread = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full, open(unread, "w") as pipe:
        for out, why in ((full, "No space left on device"), (pipe, "Broken pipe")):
            overlay = ext4.overlay()
            done = subprocess.run(
                overt_command("umount", str(overlay.target)), stdout=out, stderr=subprocess.PIPE, text=True,
                timeout=30, check=False,
            )  # fmt: skip
            ext4.overlays.remove(overlay)
            said = f"overt: {overlay.target}: unmounted; standard output: {why}\n"
            assert (done.returncode, done.stderr) == (1, said)
