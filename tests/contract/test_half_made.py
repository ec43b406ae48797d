"""A mount that fails when the kernel has begun to talk to it, at each step that can: nothing is left behind."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overt.host import mounts
from overt.server import registry
from overt.server.client import ServerError

from .conftest import Servers
from .scene import Overlay, Scene, Server, open_scene, run_overt, told, wait_until
from .test_rule_9_refusals import too_far
from .test_server_dies import loop_inode

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]


def present(server: Server) -> dict[str, object]:
    """What a mount leaves where it can be seen."""
    place = Path(f"/proc/{server.pid}")
    return {
        "mounts": len((place / "mountinfo").read_bytes().splitlines()),
        "descriptors": sorted(os.readlink(path) for path in (place / "fd").iterdir() if os.path.lexists(path)),
        "threads": len(os.listdir(place / "task")),
        "loop devices": loop_devices(place),
        "server's mounts": server.client.status()["mounts"],
    }


def loop_devices(place: Path) -> list[str]:
    """Those that stand on a page of this server's (server/connect.py)."""
    links = [path for path in (place / "fd").iterdir() if os.path.lexists(path)]
    pages = {os.stat(path).st_ino for path in links if os.readlink(path).startswith("/memfd:overt ")}
    assert pages
    return [device for number in range(256) if loop_inode(device := f"/dev/loop{number}") in pages]


def as_before(server: Server, before: dict[str, object]) -> None:
    """Or with fewer threads: one that had done its work was still there before."""

    def same() -> bool:
        now, threads = present(server), before["threads"]
        return now.pop("threads") <= threads and now == {key: before[key] for key in now}  # type: ignore[operator]

    wait_until(same, f"as it was: {before}, {present(server)}", 5)


@contextmanager
def full_registry(*, inodes: bool) -> Iterator[None]:
    """Another one, with the sockets that are there, and with room for no more files, or for no more bytes."""
    place = registry.directory()
    sockets = [path for path in os.listdir(place) if path.endswith(".sock")]
    old = os.open(place, os.O_PATH)
    options = [("mode", "700"), ("size", "4096"), ("nr_inodes", str(2 + len(sockets)) if inodes else "1000")]
    fd = mounts.new_mount("tmpfs", options)
    mounts.attach(fd, place)
    os.close(fd)
    try:
        for name in sockets:
            os.symlink(f"/proc/{os.getpid()}/fd/{old}/{name}", place / name)
        for number in range(10):
            told((place / f"filler{number}").write_bytes, bytes(4096))
        yield
    finally:
        mounts.umount(place)
        os.close(old)


@pytest.mark.parametrize("inodes", [True, False], ids=["no-more-files", "no-more-bytes"])
def test_where_the_registry_is_full(servers: Servers, inodes: bool) -> None:
    server = servers.start()
    with open_scene("ext4", server) as scene:
        scene.overlay().umount()
        overlay, options = scene.make()
        before = present(server)
        with full_registry(inodes=inodes):
            listed = os.listdir(registry.directory())
            for extra in ("", ",volatile"):
                with pytest.raises(ServerError, match=f"^{registry.directory()}/.*: No space left"):
                    server.client.mount(str(overlay.target), options + extra)
                done = run_overt("mount", "-o", options + extra, str(overlay.target))
                assert (done.returncode, done.stderr.count("\n")) == (1, 1)
                assert f"{registry.directory()}/" in done.stderr and "No space left" in done.stderr
            assert os.listdir(registry.directory()) == listed
        as_before(server, before)
        assert os.listdir(overlay.work) == []
        scene.again(overlay)
    server.stop()


def fails_and_leaves_nothing(server: Server, overlay: Overlay, options: str, target: Path, words: str) -> None:
    for extra in ("", ",volatile"):
        before = present(server)
        with pytest.raises(ServerError, match=words):
            server.client.mount(str(target), options + extra)
        as_before(server, before)
        assert os.listdir(overlay.work) == os.listdir(overlay.upper) == []


def test_where_the_mount_point_cannot_be_mounted_on(servers: Servers) -> None:
    server = servers.start()
    with open_scene("ext4", server) as scene:
        scene.overlay().umount()
        overlay, options = scene.make()
        fails_and_leaves_nothing(server, overlay, options, too_far(scene), "File name too long")
    server.stop()


@pytest.mark.parametrize("left", [[], ["work"], ["work", "work/left"]], ids=["nothing", "empty", "not-empty"])
def test_where_the_upper_is_read_only(servers: Servers, left: list[str]) -> None:
    server = servers.start()
    with open_scene("ext4", server) as scene:
        scene.overlay().umount()
        overlay, options = scene.make()
        for name in left:
            (overlay.work / name).mkdir()
        before = present(server)
        with disk_read_only(scene):
            for extra in ("", ",volatile"):
                with pytest.raises(ServerError, match=f"^workdir {overlay.work}: Read-only file system$"):
                    server.client.mount(str(overlay.target), options + extra)
            as_before(server, before)
        scene.again(overlay)
    server.stop()


@contextmanager
def disk_read_only(scene: Scene) -> Iterator[None]:
    fd = os.open(scene.root, os.O_PATH)
    try:
        mounts.reconfigure(fd, "ro")
        yield
        mounts.reconfigure(fd, "rw")
    finally:
        os.close(fd)


def test_where_the_kernel_does_not_begin_to_talk(servers: Servers) -> None:
    server = servers.start("talking")
    with open_scene("ext4", server) as scene:
        overlay, options = scene.make()
        with pytest.raises(ServerError, match="did not begin"):
            server.client.mount(str(overlay.target), options)
        fails_and_leaves_nothing(server, overlay, options, overlay.target, "did not begin")
    server.stop()


def test_wherever_descriptors_run_out(servers: Servers) -> None:
    """One more each time, until there are enough: it fails at every step that opens something."""
    server = servers.start()
    with open_scene("ext4", server) as scene:
        (scene.lower / "file").write_text("x")
        limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        scene.overlay().umount()
        overlay, options = scene.make()
        refusals = []
        lowest = present(server)
        for spare in range(60):
            as_before(server, lowest)
            used = set(map(int, os.listdir(f"/proc/{server.pid}/fd")))
            free = [number for number in range(1000) if number not in used]
            resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (free[spare], limits[1]))
            try:
                server.client.mount(str(overlay.target), options)
                break
            except ServerError as refusal:
                refusals.append(str(refusal))
            finally:
                resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
            assert os.listdir(overlay.work) == os.listdir(overlay.upper) == [], (
                refusals[-1],
                list(overlay.work.rglob("*")),
            )
        scene.overlays.append(overlay)
        assert (overlay.target / "file").read_text() == "x"
        assert len(refusals) > 8
        assert all("Too many open files" in refusal for refusal in refusals), refusals
        assert not server.client.status()["events"].get("internal error")
    server.stop()


def test_an_upper_is_free_again_though_the_workdir_beside_it_is_in_use(ext4: Scene) -> None:
    other, (overlay, options) = ext4.overlay(), ext4.make()
    with pytest.raises(ServerError, match=r"workdir .* in use by another overt mount"):
        ext4.server.client.mount(str(overlay.target), options.replace(str(overlay.work), str(other.work)))
    ext4.again(overlay)
