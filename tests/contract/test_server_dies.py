"""A server that is killed or stopped: layers whole, mounts cleared away, nobody waits for ever."""

import fcntl
import json
import os
import random
import signal
import stat
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overt.host import mounts, process
from overt.lab import bounded
from overt.server import registry

from .conftest import Servers
from .container import Container
from .scene import PAGE, Overlay, Server, open_scene, overt_command, run_overt, syncfs, told, wait_until
from .test_many_disks import has_ended

pytestmark = pytest.mark.root

LOOP_GET_STATUS64 = 0x4C05
CI_KILLS, LONG_KILLS = 20, 100


@pytest.fixture
def own(servers: Servers) -> Iterator[Server]:
    """A server that is this test's to kill."""
    server = servers.start()
    yield server
    if server.alive:
        server.stop()


def loop_of(overlay: Overlay) -> tuple[str, int]:
    """The loop device that the mount stands on, and the inode of the file behind it."""
    device = os.stat(overlay.target).st_dev
    assert os.major(device) == 7
    path = f"/dev/loop{os.minor(device)}"
    inode = loop_inode(path)
    assert inode
    return path, inode


def loop_inode(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return 0
    try:
        return int(struct.unpack_from("=QQ", fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(232)))[1])
    except OSError:  # ENXIO: attached to nothing
        return 0
    finally:
        os.close(fd)


def gone(loop: tuple[str, int]) -> bool:
    path, inode = loop
    return loop_inode(path) != inode


def mounted(overlay: Overlay) -> bool:
    return f" {overlay.target} " in Path("/proc/self/mountinfo").read_text(errors="replace")


# kill -9


def write_until_the_end(place: Path, seed: int) -> None:
    """What a busy container does; returns when the mount is dead. Every file that has its name is whole."""
    rng = random.Random(seed)
    try:
        for number in range(100_000):
            name = f"file-{rng.randrange(40)}"
            directory = place / f"dir-{rng.randrange(4)}"
            what = rng.randrange(8)
            if what == 0:
                os.makedirs(directory, exist_ok=True)
            elif what == 1:
                told(os.unlink, place / f"lower-{rng.randrange(20)}")
            elif what == 2:
                told(os.rename, place / name, directory / name)
            elif what == 3:
                told(os.chmod, place / f"lower-{rng.randrange(20)}", 0o600)
            elif what == 4:
                told(os.link, place / name, directory / f"link-{number}")
            else:
                body = f"{number:08}".encode() * (PAGE // 8)
                temporary = place / f".{number}"
                fd = os.open(temporary, os.O_CREAT | os.O_WRONLY)
                try:
                    os.write(fd, body)
                    if what == 5:
                        os.fsync(fd)
                finally:
                    os.close(fd)
                os.rename(temporary, place / name)
    except OSError:
        return


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def whole(place: Path) -> None:
    """Whatever was written under its name is there from end to end."""
    for directory, _, files in os.walk(place):
        for name in files:
            if name.startswith(".") or stat.S_ISCHR(os.lstat(f"{directory}/{name}").st_mode):
                continue  # not finished, or a whiteout
            body = Path(directory, name).read_bytes()
            assert len(body) in (PAGE, 5), (directory, name, len(body))
            assert body == body[:8] * (len(body) // 8) or body == b"lower", (directory, name)


def killed_under_load(servers: Servers, times: int) -> None:
    rng = random.Random(times)
    server = servers.start()
    with open_scene("ext4", server) as scene:
        for number in range(20):
            (scene.lower / f"lower-{number}").write_bytes(b"lower")
        lower = contents(scene.lower)
        overlays = [scene.overlay() for _ in range(2)]
        for round_ in range(times):
            loops = [loop_of(overlay) for overlay in overlays]
            children = []
            for overlay in overlays:
                child = os.fork()
                if child == 0:
                    write_until_the_end(overlay.target, rng.randrange(1 << 30) + round_)
                    os._exit(0)
                children.append(child)
            time.sleep(rng.uniform(0.01, 0.25))
            server.kill()
            for child in children:
                assert bounded.wait(child, 30) == 0
            assert contents(scene.lower) == lower
            server = scene.server = servers.start()  # which clears the dead mounts away
            assert not any(mounted(overlay) for overlay in overlays)
            for loop in loops:
                wait_until(lambda loop=loop: gone(loop), f"{loop[0]} is let go of")
            for overlay in overlays:
                whole(overlay.upper)
                scene.kernel_overlay(overlay)
                (overlay.work / "work").chmod(0o700)
                (overlay.work / "work" / "#left").touch()
            scene.overlays.clear()
            for overlay in overlays:
                scene.again(overlay)
                assert os.listdir(overlay.work / "work") == []
                whole(overlay.target)
    server.stop()


@pytest.mark.timeout(120)
def test_killed_twenty_times_under_load_it_leaves_layers_whole_and_nothing_behind(servers: Servers) -> None:
    killed_under_load(servers, CI_KILLS)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_killed_a_hundred_times_under_load(servers: Servers) -> None:
    killed_under_load(servers, LONG_KILLS)


@pytest.mark.timeout(60)
def test_overt_umount_clears_a_dead_mount_and_says_that_data_may_be_lost(own: Server, servers: Servers) -> None:
    with open_scene("ext4", own) as scene:
        overlay = scene.overlay()
        scene.close(overlay.write("file"))
        loop = loop_of(overlay)
        own.kill()
        status = run_overt("status")
        assert f"{overlay.target}  dead" in status.stdout
        done = run_overt("umount", str(overlay.target))
        assert (done.returncode, done.stdout) == (3, "")
        assert "dead" in done.stderr
        assert "may be lost" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not mounted(overlay)
        wait_until(lambda: gone(loop), "the loop device is let go of")
        scene.overlays.clear()


@pytest.mark.timeout(60)
def test_dead_mounts_that_are_not_registered_any_more(own: Server, servers: Servers, tmp_path: Path) -> None:
    """A server in another mount namespace, which shares /run, has taken the entries away.

    They are shown, and a new server clears them; one in a user namespace, where they are locked, cannot and mounts.
    """
    with open_scene("ext4", own) as scene:
        overlay, other = scene.overlay(), scene.overlay()
        own.kill()
        for entry in registry.entries():
            if entry.target in (str(overlay.target), str(other.target)):
                registry.remove(entry.file)
        shown = run_overt("status").stdout
        assert f"{overlay.target}  dead: its server is gone" in shown
        assert f"{other.target}  dead: its server is gone" in shown
        (tmp_path / "mnt").mkdir()
        mount = overt_command("mount", "-o", f"lowerdir={tmp_path}", str(tmp_path / "mnt"))
        words = ["unshare", "-Urm", "sh", "-ec", '"$@"; umount "$0"', str(tmp_path / "mnt"), *mount]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        scene.server = servers.start()
        assert not mounted(overlay)
        assert not mounted(other)
        scene.overlays.clear()


@pytest.mark.timeout(60)
def test_the_loop_device_goes_with_the_last_copy_of_the_mount(own: Server, servers: Servers) -> None:
    with open_scene("ext4", own) as scene:
        overlay = scene.overlay()
        container = scene.container()  # its namespace has a copy
        loop = loop_of(overlay)
        own.kill()
        assert run_overt("umount", str(overlay.target)).returncode == 3
        assert not gone(loop)
        container.close()
        scene.containers.remove(container)
        wait_until(lambda: gone(loop), "the loop device is let go of")
        scene.overlays.clear()


@pytest.mark.timeout(60)
def test_whoever_uses_a_dead_mount_is_told_at_once(own: Server) -> None:
    with open_scene("ext4", own) as scene:
        overlay = scene.overlay()
        fd = overlay.write("file", data=b"x")
        directory = overlay.open()
        own.kill()
        assert told(os.fsync, fd) != 0
        assert syncfs(directory) != 0
        assert told(os.stat, overlay.target / "other") != 0
        scene.close(fd)
        scene.close(directory)
        run_overt("umount", str(overlay.target))
        scene.overlays.clear()


@pytest.mark.timeout(60)
def test_sigterm_unmounts_everything(own: Server) -> None:
    with open_scene("ext4", own) as scene:
        overlays = [scene.overlay() for _ in range(3)]
        scene.close(overlays[0].write("file"))
        loops = [loop_of(overlay) for overlay in overlays]
        assert own.stop() == 0
        assert not any(mounted(overlay) for overlay in overlays)
        assert scene.disk.marker in scene.disk.snapshot(durable=True)
        for loop in loops:
            wait_until(lambda loop=loop: gone(loop), f"{loop[0]} is let go of")
        scene.overlays.clear()


# SIGSTOP


def stop_and_wait(server: Server, container: Container, fd: int) -> None:
    """Stop the server while somebody in the container asks it; he goes free, and the server is put down."""
    os.kill(server.pid, signal.SIGSTOP)
    container.begin("syncfs", fd)
    begun = time.monotonic()
    assert container.end() != 0
    assert time.monotonic() - begun < 20
    wait_until(lambda: not server.alive, "the server is put down")
    container.close()


@pytest.mark.timeout(60)
def test_a_server_that_has_stopped_answering_is_put_down_and_who_waits_goes_free(servers: Servers) -> None:
    server = servers.start("patience")
    with open_scene("ext4", server) as scene:
        overlay = scene.overlay()
        container = scene.container()
        fd = container.open(overlay.target)
        loop = loop_of(overlay)
        stop_and_wait(server, container, fd)
        scene.containers.remove(container)
        assert run_overt("umount", str(overlay.target)).returncode == 3
        wait_until(lambda: gone(loop), "the loop device is let go of")
        scene.overlays.clear()
    server.client.close()


def processor_seconds(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.timeout(60)
def test_so_it_has_where_the_server_was_started_with_sigchld_ignored(servers: Servers) -> None:
    """Which is inherited over execve(2): a child that has ended is not to be waited for then."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        server = servers.start("patience")
    finally:
        signal.signal(signal.SIGCHLD, before)
    with open_scene("ext4", server) as scene:
        for _ in range(2):
            (watchdog,) = process.children(server.pid)
            os.kill(watchdog, signal.SIGKILL)
            wait_until(lambda was=watchdog: process.children(server.pid) not in ([], [was]), "there is another one", 10)
        assert len(scene.events("the watchdog has ended: another one is started")) == 2
        assert scene.events("internal error") == []
    assert server.stop() == 0


@pytest.mark.timeout(60)
def test_a_watchdog_that_is_killed_has_a_successor_that_guards_the_same_mounts(servers: Servers) -> None:
    server = servers.start("patience")
    with open_scene("ext4", server) as scene:
        overlay, other = scene.overlay(), scene.overlay()
        other.umount()
        container = scene.container()
        fd = container.open(overlay.target)
        (watchdog,) = process.children(server.pid)
        os.kill(watchdog, signal.SIGKILL)
        wait_until(lambda: process.children(server.pid) not in ([], [watchdog]), "there is another one", 10)
        late = scene.overlay()
        before = processor_seconds(server.pid)
        time.sleep(1)
        assert processor_seconds(server.pid) - before < 0.5
        assert len(scene.events("the watchdog has ended: another one is started")) == 1
        loops = [loop_of(overlay), loop_of(late)]
        stop_and_wait(server, container, fd)
        scene.containers.remove(container)
        for each in (overlay, late):
            assert run_overt("umount", str(each.target)).returncode == 3
        for loop in loops:
            wait_until(lambda loop=loop: gone(loop), "the loop device is let go of")
        scene.overlays.clear()
    server.client.close()


@pytest.mark.timeout(60)
def test_a_server_that_waits_for_its_disk_is_left_alone(servers: Servers) -> None:
    server = servers.start("patience")
    with open_scene("ext4", server) as scene:
        overlay = scene.overlay()
        container = scene.container()
        fd = container.open(overlay.target)
        overlay.write("file", data=b"x")
        scene.disk.hang()
        try:
            container.begin("syncfs", fd)
            time.sleep(4)
            assert server.alive
            assert (overlay.target / "file").read_bytes() == b"x"  # and it serves others meanwhile
        finally:
            scene.disk.resume()
        assert container.end() == 0
    server.stop()


@pytest.mark.timeout(60)
def test_killed_as_the_last_of_its_mount_namespace_it_does_not_wait_for_itself(tmp_path: Path) -> None:
    """It would, and every sync(2) with it: the kernel unmounts before it closes the descriptors of who dies."""
    for name in ("lower", "m"):
        (tmp_path / name).mkdir()
    for attempt in range(6):
        loop = namespace_that_dies(tmp_path, f"socket-{attempt}", watched=attempt % 2 == 0)
        try:
            wait_until(lambda loop=loop: gone(loop), "the loop device is let go of", 5)
        except AssertionError:
            abort(loop)
            raise


@pytest.mark.timeout(60)
def test_without_a_descriptor_of_its_namespace_it_would(tmp_path: Path) -> None:
    for name in ("lower", "m"):
        (tmp_path / name).mkdir()
    loop = namespace_that_dies(tmp_path, "socket", watched=False, off="outliving")
    try:
        time.sleep(3)
        assert not gone(loop)
    finally:
        abort(loop)
    wait_until(lambda: gone(loop), "the loop device is let go of", 5)


def namespace_that_dies(base: Path, name: str, *, watched: bool, off: str = "") -> tuple[str, int]:
    """Kill the server that is alone in a namespace; return the loop device of its mount.

    Not `watched`: its watchdog dies first, as with a whole cgroup.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            process.unshare(process.CLONE_NEWNS)
            mounts.make_private()
            fd = mounts.new_mount("tmpfs", [])
            (base / "m").mkdir(exist_ok=True)
            mounts.attach(fd, str(base / "m"))
            for directory in ("upper", "work", "merged"):
                (base / "m" / directory).mkdir()
            server = Server(base / name, off)
            where = base / "m"
            server.client.mount(
                str(where / "merged"), f"lowerdir={base}/lower,upperdir={where}/upper,workdir={where}/work"
            )
            for number in range(5):  # threads, which end one by one
                file = os.open(where / "merged" / f"file-{number}", os.O_CREAT | os.O_RDWR)
                os.fsync(file)
                os.close(file)
            device = os.stat(where / "merged").st_dev
            path = f"/dev/loop{os.minor(device)}"
            os.write(writing, json.dumps([server.pid, process.children(server.pid), path, loop_inode(path)]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        pid, watchdogs, path, inode = json.load(pipe)
    assert bounded.wait(child, 30) == 0
    assert watchdogs
    if not watched:
        os.kill(pid, signal.SIGSTOP)  # it would start another one
        for each in watchdogs:
            os.kill(each, signal.SIGKILL)
            wait_until(lambda each=each: has_ended(each), "the watchdog ends", 5)
    os.kill(pid, signal.SIGKILL)
    return path, inode


def abort(loop: tuple[str, int]) -> None:
    """End what hangs, for the sake of the others."""
    fusectl = mounts.new_mount("fusectl", [])
    number = os.stat(loop[0]).st_rdev
    Path(f"/proc/self/fd/{fusectl}/{os.major(number) << 20 | os.minor(number)}/abort").write_text("1")
    os.close(fusectl)


# An aborted connection


@pytest.mark.timeout(60)
def test_a_connection_that_is_aborted_while_its_cursor_is_set_costs_no_other_mount(servers: Servers) -> None:
    """As by `umount -f`: the page that the server dirties, of a file of its own mount, is not to be had any more."""
    server = servers.start("aborting")
    with open_scene("ext4", server) as scene:
        overlay, other = scene.overlay(), scene.overlay()
        (other.target / "file").write_bytes(b"x")
        fd = overlay.lose()
        assert syncfs(fd) != 0
        assert (other.target / "file").read_bytes() == b"x"
        scene.close(fd)
        mounts.umount(str(overlay.target), mounts.MNT_DETACH)
        scene.overlays.remove(overlay)
        wait_until(lambda: scene.events("cursor not set"), "the server says that the cursor is not set")
        assert not server.client.status()["events"].get("internal error")
    assert server.stop() == 0
