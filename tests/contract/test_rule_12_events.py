"""Rule 12: every error is also an event: in the log, on the socket, in `overt status`."""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from overt.host import mounts

from .conftest import Servers
from .scene import EIO, Scene, Server, fsync, open_scene, run_overt, syncfs, wait_until

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

Stage = Callable[..., Scene]


def test_an_error_is_in_the_log_on_the_socket_and_in_the_status(scene: Scene) -> None:
    overlay, other = scene.overlay(), scene.overlay()
    victim = overlay.lose()
    assert [overlay.new_syncfs(), other.new_syncfs(), fsync(victim)] == [EIO, EIO, EIO]

    (seen,) = [event for event in scene.events("upper error") if event["upper"] == scene.upper_device()]
    assert (seen["error"], seen["number"], seen["taken_from_host"]) == (EIO, 1, False)
    told = {event["mount"]: event["error"] for event in scene.events("told")}
    assert told.items() >= {str(overlay.target): EIO, str(other.target): EIO}.items()
    (lost,) = [event for event in scene.events("file lost") if event["mount"] == str(overlay.target)]
    assert (lost["file"], lost["error"], lost["call"]) == ("/victim", EIO, "fsync")

    logged = [json.loads(line) for line in scene.server.log.read_text().splitlines()]
    assert all(event in logged for event in (seen, lost))

    shown = run_overt("status", "--events")
    assert shown.returncode == 0
    assert seen in [json.loads(line) for line in shown.stdout.splitlines()]

    upper = scene.server.upper_status(scene.upper_device())
    (error,) = upper["errors"]
    assert error["errno"] == EIO
    assert sorted(error["told"]) == sorted([str(overlay.target), str(other.target)])
    mounts = {mount["target"]: mount for mount in scene.server.client.status()["mounts"]}
    assert mounts[str(overlay.target)]["lost"] == ["/victim"]
    assert [mounts[str(mount.target)]["errors"] for mount in (overlay, other)] == [1, 1]


def test_overt_status_prints_it_for_people_and_for_programs(ext4: Scene) -> None:
    overlay = ext4.overlay()
    victim = ext4.overlay().lose()
    assert fsync(victim) == EIO
    status = json.loads(run_overt("status", "--json").stdout)
    (server,) = [server for server in status["servers"] if server["pid"] == ext4.server.pid]
    assert str(overlay.target) in [mount["target"] for mount in server["mounts"]]
    words = run_overt("status").stdout
    assert "lost: /victim" in words
    assert "Input/output error" in words


def test_status_knows_of_an_error_that_nobody_has_asked_about(scene: Scene) -> None:
    scene.overlay().lose()
    (error,) = scene.server.upper_status(scene.upper_device())["errors"]
    assert (error["errno"], error["told"]) == (EIO, [])
    assert scene.host_syncfs() == EIO


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_server_whose_standard_error_nobody_reads_answers_as_ever_and_lets_go_of_its_mounts(
    servers: Servers, tmp_path: Path, is_gone: bool
) -> None:
    """The journal is restarted, or waits for the very disk that fails: what cannot be written is on record."""
    reading, writing = os.pipe()
    try:
        os.write(writing, b"." * fcntl.fcntl(writing, fcntl.F_GETPIPE_SZ))
        server = Server(tmp_path / "server", stderr=writing)
    finally:
        os.close(writing)
    if is_gone:
        os.close(reading)
    try:
        with open_scene("ext4", server) as scene:
            overlay, other, volatile = scene.overlay(), scene.overlay(), scene.overlay(volatile=True)
            sticky = volatile.write("file")
            fd = overlay.lose()
            assert [fsync(sticky), fsync(fd), overlay.new_syncfs(), other.new_syncfs()] == [EIO] * 4
            assert [fsync(fd), overlay.new_syncfs(), other.new_syncfs()] == [0] * 3
            scene.close(fd)
            assert overlay.umount()["verdict"] == "lost"
            other.umount()
            scene.close(sticky)
            volatile.umount()
            wait_until(lambda: not server.client.status()["mounts"], "the server lets go of the mounts", 10)
            assert len(scene.events("upper error")) == 1
            assert len(scene.events("unmounted")) == 3
        assert server.stop() == 0
    finally:
        server.kill()
        if not is_gone:
            os.close(reading)


def test_told_counts_errors_and_on_a_volatile_mount_answers(ext4: Scene) -> None:
    volatile, ordinary = ext4.overlay(volatile=True), ext4.overlay()
    fds = [each.open() for each in (volatile, ordinary) for _ in range(3)]
    counts = []
    for name in ("one", "two"):
        ordinary.lose(name)
        assert [syncfs(fd) for fd in fds] == [EIO] * 6
        status = ext4.server.client.status()
        told = {mount["target"]: mount["told"] for mount in status["mounts"]}
        counts.append([told[str(each.target)] for each in (volatile, ordinary)])
    assert counts == [[3, 1], [6, 2]]


def test_nobody_was_told_by_a_remount(ext4: Scene) -> None:
    volatile, ordinary = ext4.overlay(volatile=True), ext4.overlay()
    ext4.close(ordinary.lose())

    def told() -> tuple[list[str], list[int]]:
        status = ext4.server.client.status()
        (error,) = ext4.server.upper_status(ext4.upper_device())["errors"]
        counts = {mount["target"]: mount["told"] for mount in status["mounts"]}
        return sorted(error["told"]), [counts[str(each.target)] for each in (volatile, ordinary)]

    for overlay in (volatile, ordinary):
        fd = os.open(overlay.target, os.O_RDONLY | os.O_DIRECTORY)
        mounts.reconfigure(fd, "rw")
        os.close(fd)
    assert told() == ([], [0, 0])
    assert ext4.events("told") == []
    assert [ordinary.new_syncfs(), volatile.new_syncfs()] == [EIO, EIO]
    assert told() == (sorted([str(volatile.target), str(ordinary.target)]), [1, 1])
    assert [ordinary.new_syncfs(), volatile.new_fsync(".")] == [0, EIO]
    assert told()[1] == [2, 1]
    assert [event["mount"] for event in ext4.events("told")] == [str(ordinary.target)]
