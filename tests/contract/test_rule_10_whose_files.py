"""Rule 10: a file is named as lost if it was that file, and not another that has, or had, its number."""

import os
import subprocess
import time
from collections.abc import Callable

import pytest

from .scene import EIO, Scene

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

Stage = Callable[..., Scene]


def test_a_file_that_has_the_number_of_a_lost_one_is_not_named(ext4: Scene) -> None:
    overlay = ext4.overlay()
    fd = overlay.lose()
    number = os.stat(overlay.upper / "victim").st_ino
    ext4.close(fd)
    os.unlink(overlay.target / "victim")
    time.sleep(0.1)  # a birth time is of the last tick
    for attempt in range(20):
        with open(overlay.target / f"later-{attempt}", "wb") as file:
            file.write(b"written and flushed after the error")
            file.flush()
            os.fsync(file.fileno())
        if os.stat(overlay.upper / f"later-{attempt}").st_ino == number:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the number was not used again")
    record = overlay.umount()
    assert (record["verdict"], record.get("files", [])) == ("may be lost", [])


def test_the_same_file_failing_again_is_named(ext4: Scene) -> None:
    """Its number had been another's that failed before."""
    overlay = ext4.overlay()
    ext4.close(overlay.lose())
    assert overlay.new_syncfs() == EIO
    number = os.stat(overlay.upper / "victim").st_ino
    os.unlink(overlay.target / "victim")
    time.sleep(0.1)
    for attempt in range(20):
        fd = overlay.write(f"later-{attempt}", data=b"x")
        if os.stat(overlay.upper / f"later-{attempt}").st_ino == number:
            break
        ext4.close(fd)
        time.sleep(0.1)
    else:
        pytest.fail("the number was not used again")
    os.pwrite(fd, ext4.page, 0)
    ext4.fail()
    ext4.close(fd)
    record = overlay.umount()
    assert (record["verdict"], record["files"]) == ("lost", [f"/later-{attempt}"])


def test_the_same_file_failing_again_is_named_when_nobody_has_asked_in_between(ext4: Scene) -> None:
    """All that has failed is seen at one look then: a number that was another's first is this file's at last."""
    overlay = ext4.overlay()
    fds = [overlay.write("other")]
    ext4.close(overlay.lose())
    number = os.stat(overlay.upper / "victim").st_ino
    os.unlink(overlay.target / "victim")
    time.sleep(0.1)
    for attempt in range(20):
        fds.append(overlay.write(f"later-{attempt}", data=b"x"))
        if os.stat(overlay.upper / f"later-{attempt}").st_ino == number:
            break
        ext4.close(fds.pop())
        time.sleep(0.1)
    else:
        pytest.fail("the number was not used again")
    os.pwrite(fds[-1], ext4.page, 0)
    ext4.fail()
    for fd in fds:
        ext4.close(fd)
    record = overlay.umount()
    assert (record["verdict"], record["errors"]) == ("lost", 1)
    assert (record["files"], record["perhaps_more"]) == ([f"/later-{attempt}", "/other"], False)


def test_on_btrfs_with_subvolumes_a_number_is_not_enough(stage: Stage) -> None:
    scene = stage("btrfs")
    targets = []
    for name in ("a", "b"):
        volume = scene.root / name
        subprocess.run(["btrfs", "subvolume", "create", volume], check=True, capture_output=True, timeout=30)
        for part in (volume / "upper", volume / "work", scene.base / name):
            part.mkdir()
        options = f"lowerdir={scene.lower},upperdir={volume}/upper,workdir={volume}/work"
        scene.server.client.mount(str(scene.base / name), options)
        targets.append(scene.base / name)
    try:
        (targets[0] / "file").write_bytes(scene.page)
        number = os.stat(scene.root / "a/upper/file").st_ino
        for attempt in range(100):
            (targets[1] / "file").write_bytes(b"innocent")
            if os.stat(scene.root / "b/upper/file").st_ino == number:
                break
            (targets[1] / "file").rename(targets[1] / f"{attempt}")
        else:
            pytest.fail("no file of the other subvolume has the same number")
        scene.fail()
    finally:
        records = [scene.server.client.umount(str(target)) for target in targets]
    assert [(record["verdict"], record["files"]) for record in records] == [("may be lost", ["/file"])] * 2


def test_where_not_all_is_known_there_may_be_more_than_what_fsync_told(stage: Stage) -> None:
    scene = stage("ext4", off="tracing")
    overlay = scene.overlay()
    fds = [overlay.write(name) for name in ("told", "not-told")]
    scene.fail()
    assert overlay.new_fsync("told") == EIO
    for fd in fds:
        scene.close(fd)
    record = overlay.umount()
    assert (record["verdict"], record["files"], record["perhaps_more"]) == ("lost", ["/told"], True)
