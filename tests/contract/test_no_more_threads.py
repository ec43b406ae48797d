"""A server that can have no more threads (pids.max, TasksMax): it goes on, and what it answers is true."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overt.server import registry
from overt.server.client import Client, ServerError

from .conftest import Servers
from .scene import EIO, Overlay, Server, fsync, open_scene, overt_command, syncfs, told, wait_until

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """While this file exists there are no more threads."""
    return tmp_path / "full"


@pytest.fixture
def own(servers: Servers, full: Path) -> Iterator[Server]:
    server = servers.start(f"no_more_threads:{full}")
    yield server
    full.unlink(missing_ok=True)
    assert server.stop() == 0


def answers(overlay: Overlay) -> bool:
    """Whether the server serves this mount."""
    asking = threading.Thread(target=told, args=(os.statvfs, overlay.target), daemon=True)
    asking.start()
    asking.join(5)
    return not asking.is_alive()


@contextmanager
def leader_kept(overlay: Overlay) -> Iterator[None]:
    """Whoever leads flushes a file himself, as is done where that was quick, and the disk hangs."""
    fd = overlay.write("file", data=b"x")
    for _ in range(20):
        assert fsync(fd) == 0
    overlay.scene.disk.hang()
    try:
        os.pwrite(fd, b"y", 0)
        waiting = threading.Thread(target=fsync, args=(fd,), daemon=True)
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        yield
    finally:
        overlay.scene.disk.resume()
    waiting.join(10)
    assert not waiting.is_alive()


def test_somebody_leads_when_a_leader_is_kept_and_there_can_be_no_lookout(own: Server, full: Path) -> None:
    with open_scene("ext4", own) as scene:
        overlay, other = scene.overlay(), scene.overlay()
        full.touch()
        with leader_kept(overlay):
            assert answers(other)
        assert answers(overlay)
        assert scene.events("nobody looks out for the engine's leader")
        with leader_kept(overlay):  # the one that was kept looks out by now
            assert answers(other)
        full.unlink()
        assert not own.client.status()["events"].get("internal error")


def test_when_there_can_be_threads_again_somebody_looks_out(own: Server, full: Path) -> None:
    with open_scene("ext4", own) as scene:
        overlay, other = scene.overlay(), scene.overlay()
        tasks = Path(f"/proc/{own.pid}/task")
        full.touch()
        with leader_kept(overlay):
            assert answers(other)
            before = len(list(tasks.iterdir()))
            full.unlink()
            wait_until(lambda: answers(other) and len(list(tasks.iterdir())) > before, "there is one more thread", 10)


def test_syncfs_is_answered_with_an_error_where_nothing_can_be_flushed_and_nothing_stays_behind(
    own: Server, full: Path
) -> None:
    with open_scene("ext4", own) as scene:
        overlay, other = scene.overlay(), scene.overlay()
        old = other.open()
        fd = overlay.lose()
        full.touch()
        assert [syncfs(fd), syncfs(old)] == [EIO, EIO]
        full.unlink()
        assert [syncfs(fd), syncfs(fd), syncfs(old), syncfs(old)] == [EIO, 0, EIO, 0]
        assert scene.events("not flushed")
        scene.close(fd)
        scene.close(old)
        overlay.umount()
        other.umount()
        wait_until(lambda: not own.client.status()["mounts"], "the server lets go of the mounts", 10)
        assert not own.client.status()["events"].get("internal error")


def test_who_asks_for_what_takes_a_thread_is_turned_away(own: Server, full: Path) -> None:
    full.touch()
    with Client(own.socket) as client, pytest.raises(ServerError, match="can take no more clients"):
        client.status()
    full.unlink()
    with Client(own.socket) as client:
        assert client.status()["events"]["client turned away"]
        assert not client.status()["events"].get("internal error")


def test_a_server_that_is_told_to_end_ends_as_soon_as_it_can(servers: Servers, full: Path) -> None:
    server = servers.start(f"no_more_threads:{full}")
    with open_scene("ext4", server) as scene:
        overlay = scene.overlay()
        full.touch()
        os.kill(server.pid, signal.SIGTERM)
        wait_until(lambda: scene.events("does not end yet"), "it cannot end", 5)
        full.unlink()
        assert server.process.wait(20) == 0
        assert not os.path.ismount(overlay.target)
        scene.overlays.remove(overlay)
    server.client.close()


def test_one_that_has_begun_to_end_needs_no_more_threads(servers: Servers, full: Path) -> None:
    """One for each upper would be quicker."""
    server = servers.start(f"no_more_threads:{full}")
    with open_scene("ext4", server) as scene:
        overlay = scene.overlay()
        full.write_bytes(b"1")
        os.kill(server.pid, signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert not os.path.ismount(overlay.target)
        scene.overlays.remove(overlay)
    server.client.close()


@pytest.mark.parametrize("threads", [0, 1])
def test_one_that_cannot_begin_says_so_and_leaves_nothing(full: Path, tmp_path: Path, threads: int) -> None:
    full.write_bytes(b"1" * threads)
    command = overt_command("serve", "-f", "--socket", str(tmp_path / "socket"), off=f"no_more_threads:{full}")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        _, said = server.communicate(timeout=30)
    assert (server.returncode, said.splitlines()[-1]) == (1, "overt: can't start new thread")
    assert "Traceback" not in said
    assert not (tmp_path / "socket").exists()
    assert not os.path.lexists(registry.directory() / f"{server.pid}.sock")
