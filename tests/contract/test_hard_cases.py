"""Uppers that die, overlays on overlays, and what else use cases U19 and U25 name."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overt.host import mounts
from overt.server.client import ServerError

from .conftest import Servers
from .scene import EIO, Overlay, Scene, fsync, open_scene, syncfs, told, wait_until

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

Stage = Callable[..., Scene]


def test_an_upper_that_has_died_fails_every_call_in_every_overlay(scene: Scene) -> None:
    """U19: an aborted journal, a filesystem that was shut down, an aborted transaction; well again or not."""
    overlays = [scene.overlay() for _ in range(2)]
    volatile = scene.overlay(volatile=True)
    fds = [overlay.open() for overlay in (*overlays, volatile)]
    os.mkdir(overlays[0].target / "directory")
    overlays[0].write("directory/file")
    scene.disk.fail("all")
    first = [syncfs(fd) for fd in fds]
    scene.disk.heal()
    assert first == [EIO, EIO, EIO]
    for _ in range(4):
        assert [syncfs(fd) for fd in fds] == [EIO, EIO, EIO]


def test_a_flush_that_failed_once_is_told_once_to_each(stage: Stage) -> None:
    """The device is well again, and the filesystem never noticed: ext4 without a journal."""
    scene = stage("ext4-nojournal")
    overlays = [scene.overlay() for _ in range(2)]
    old = [overlay.open() for overlay in overlays]
    overlays[0].write("file", data=b"x")
    scene.disk.fail("flush")
    first = syncfs(old[0])
    scene.disk.heal()
    assert first == EIO
    assert [syncfs(old[0]), syncfs(old[1]), syncfs(old[1])] == [0, EIO, 0]
    assert [overlay.new_syncfs() for overlay in overlays] == [0, 0]


# Overlays on overlays


@contextmanager
def kernel_overlay(scene: Scene, lower: Path, upper: Path, work: Path) -> Iterator[Path]:
    """A kernel overlay, in sight."""
    place = scene.base / "kernel"
    place.mkdir()
    options: list[tuple[str, str | int | None]] = [
        ("lowerdir", str(lower)), ("upperdir", str(upper)), ("workdir", str(work)),
    ]  # fmt: skip
    fd = mounts.new_mount("overlay", options)
    mounts.attach(fd, str(place))
    os.close(fd)
    try:
        yield place
    finally:
        mounts.umount(str(place))


def test_overt_is_a_lower_layer_of_a_kernel_overlay(scene: Scene) -> None:
    overlay = scene.overlay()
    scene.close(overlay.write("file"))
    for name in ("k-upper", "k-work"):
        (scene.root / name).mkdir()
    with kernel_overlay(scene, overlay.target, scene.root / "k-upper", scene.root / "k-work") as place:
        assert (place / "file").read_bytes() == scene.page
        (place / "file").write_bytes(b"changed")
        assert (place / "file").read_bytes() == b"changed"
        assert (overlay.target / "file").read_bytes() == scene.page
        os.unlink(place / "file")
        assert not (place / "file").exists()


def test_overt_as_the_upper_of_a_kernel_overlay_is_refused_by_the_kernel(ext4: Scene) -> None:
    """It takes no upper that can change behind its back (ovl_dentry_remote), which all FUSE filesystems may."""
    overlay = ext4.overlay()
    for name in ("upper", "work"):
        os.mkdir(overlay.target / name)
    with (
        pytest.raises(OSError, match="Invalid argument"),
        kernel_overlay(ext4, ext4.lower, overlay.target / "upper", overlay.target / "work"),
    ):
        pass
    os.rmdir(ext4.base / "kernel")


def test_a_kernel_overlay_is_a_lower_layer_of_overt(scene: Scene) -> None:
    (scene.lower / "file").write_bytes(scene.page)
    for name in ("k-upper", "k-work"):
        (scene.root / name).mkdir()
    with kernel_overlay(scene, scene.lower, scene.root / "k-upper", scene.root / "k-work") as place:
        (place / "other").write_bytes(b"other")
        scene.lower, lowest = place, scene.lower
        overlay = scene.overlay()
        scene.lower = lowest
        assert (overlay.target / "file").read_bytes() == scene.page
        assert (overlay.target / "other").read_bytes() == b"other"
        fd = overlay.open("other", os.O_RDWR)
        os.pwrite(fd, scene.page, 0)
        scene.fail()
        assert [fsync(fd), fsync(fd), overlay.new_syncfs(), overlay.new_syncfs()] == [EIO, 0, EIO, 0]
        scene.close(fd)
        overlay.umount()


def test_overt_is_a_lower_layer_of_overt_and_an_upper_it_refuses_to_be(scene: Scene, servers: Servers) -> None:
    """Another server's, that is. As an upper it lacks RENAME_WHITEOUT, which kernel overlayfs does not offer either."""
    outer = scene.overlay()
    for name in ("upper", "work"):
        os.mkdir(outer.target / name)
    scene.close(outer.write("file"))
    other = servers.get("again")
    inner, options = scene.make()
    with pytest.raises(ServerError, match="RENAME_WHITEOUT"):
        other.client.mount(
            str(inner.target), f"lowerdir={scene.lower},upperdir={outer.target}/upper,workdir={outer.target}/work"
        )
    assert os.listdir(outer.target / "work") == []
    other.client.mount(str(inner.target), options.replace(str(scene.lower), str(outer.target)))
    try:
        assert (inner.target / "file").read_bytes() == scene.page
        fd = os.open(inner.target / "file", os.O_RDWR)
        os.pwrite(fd, scene.page, 4096)
        scene.fail()
        root = os.open(inner.target, os.O_RDONLY)
        answers = [fsync(fd), fsync(fd), syncfs(root), syncfs(root), outer.new_syncfs(), outer.new_syncfs()]
        os.close(root)
        os.close(fd)
    finally:
        other.client.umount(str(inner.target))
    assert answers == [EIO, 0, EIO, 0, EIO, 0]


def test_a_layer_on_a_mount_of_the_same_server_is_refused(ext4: Scene) -> None:
    """The server would wait for itself."""
    outer = ext4.overlay()
    for name in ("lower", "upper", "work"):
        os.mkdir(outer.target / name)
    inner, _ = ext4.make()
    for layers in (
        f"lowerdir={outer.target}/lower",
        f"lowerdir={ext4.lower},upperdir={outer.target}/upper,workdir={outer.target}/work",
    ):
        with pytest.raises(ServerError, match="same server"):
            ext4.server.client.mount(str(inner.target), layers)


# Read-only


def test_a_mount_without_an_upper_has_nothing_to_tell(ext4: Scene) -> None:
    (ext4.lower / "file").write_bytes(b"lower")
    place = ext4.base / "plain"
    place.mkdir()
    ext4.server.client.mount(str(place), f"lowerdir={ext4.lower}")
    fd = os.open(place / "file", os.O_RDONLY)
    assert [fsync(fd), syncfs(fd)] == [0, 0]
    assert told(os.open, place / "new", os.O_CREAT | os.O_WRONLY) == errno.EROFS
    os.close(fd)
    ext4.server.client.umount(str(place))


def test_a_mount_that_is_read_only_by_option_is_told_of_its_uppers_errors(scene: Scene) -> None:
    """Nothing was written through it, but rule 2 says: in every overlay."""
    other, overlay, volatile = scene.overlay(), scene.overlay("ro"), scene.overlay("ro", volatile=True)
    assert told(os.open, overlay.target / "new", os.O_CREAT | os.O_WRONLY) == errno.EROFS
    old = overlay.open()
    other.lose()
    assert [overlay.new_syncfs(), overlay.new_syncfs(), syncfs(old), syncfs(old)] == [EIO, 0, EIO, 0]
    assert [volatile.new_syncfs(), volatile.new_syncfs()] == [EIO, EIO]


# Where the kernel keeps syncfs from us


def test_without_syncfs_from_the_kernel_what_is_known_is_told(stage: Stage, filesystem: str) -> None:
    scene = stage(filesystem, off="fuseblk")
    overlays = [scene.overlay() for _ in range(2)]
    assert any("syncfs(2) does not reach this mount" in line for line in scene.notices)
    old = overlays[1].open()
    fd = overlays[0].lose()
    assert fsync(fd) == EIO
    for overlay in overlays:
        wait_told(overlay)
    assert [syncfs(old), syncfs(old)] == [EIO, 0]


def test_without_the_tracepoint_either_the_next_error_is_told_as_well(stage: Stage) -> None:
    """As in a user namespace. Nobody's syncfs flushes there, and after an error only a flush can see the next."""
    scene = stage("ext4", off="fuseblk,tracing")
    overlays = [scene.overlay() for _ in range(2)]
    old = overlays[1].open()
    for _ in range(2):
        assert fsync(overlays[0].lose()) == EIO
        for overlay in overlays:
            wait_told(overlay)
        assert [syncfs(old), syncfs(old)] == [EIO, 0]


def test_a_mount_without_an_upper_says_nothing_of_whether_syncfs_reaches_the_next(servers: Servers) -> None:
    """Its superblock is read-only, and so the kernel does not ask it."""
    server = servers.start()
    with open_scene("ext4", server) as scene:
        place = scene.base / "plain"
        place.mkdir()
        server.client.mount(str(place), f"lowerdir={scene.lower}")
        try:
            overlay = scene.overlay()
            assert scene.notices == []
            overlay.lose()
            assert [overlay.new_syncfs(), overlay.new_syncfs()] == [EIO, 0]
        finally:
            server.client.umount(str(place))
    server.stop()


def wait_told(overlay: Overlay) -> None:
    """An error is carried over as soon as it is known, not when somebody asks: give it a moment."""
    wait_until(lambda: overlay.new_syncfs() == EIO, "the error is told", 10)
    assert overlay.new_syncfs() == 0


def test_an_open_that_fails_at_the_setuid_bit_leaves_no_descriptor(stage: Stage) -> None:
    scene = stage("ext4", off="dropping")
    overlay = scene.overlay()
    scene.base.chmod(0o755)
    scene.close(overlay.write("program"))
    (overlay.target / "program").chmod(0o4777)
    user = scene.container(lambda: os.setuid(1000))
    before = os.listdir(f"/proc/{scene.server.pid}/fd")
    answers = {user.open(overlay.target / "program", os.O_WRONLY | os.O_TRUNC) for _ in range(5)}
    assert answers == {-errno.EPERM}
    assert len(os.listdir(f"/proc/{scene.server.pid}/fd")) <= len(before)


def test_a_server_without_descriptors_tells_by_its_answer_and_when_it_has_some_as_ever(servers: Servers) -> None:
    server = servers.start()
    with open_scene("ext4", server) as scene:
        overlay = scene.overlay()
        old = overlay.open()
        scene.close(overlay.lose())
        limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            assert [syncfs(old), syncfs(old)] == [EIO, EIO]  # the way to the cursor takes descriptors: it stays owed
        finally:
            resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
        assert [syncfs(old), syncfs(old), overlay.new_syncfs()] == [EIO, 0, 0]
        assert not server.client.status()["events"].get("internal error")
    server.stop()
