"""Rule 12: every error is also an event: in the log, on the socket, in `overt status`."""

import json
from collections.abc import Callable

import pytest

from .scene import EIO, Scene, fsync, run_overt

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
