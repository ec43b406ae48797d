"""Units, as systemd reads them, and sockets that systemd has opened: what runtimes say waits for the guard."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overt.guard import activation, supervisor

from .ground import EIO, SOURCE, Ground, wait_until

UNITS = SOURCE.parent / "systemd"
EXPOSURE = {"overt-guard.service": 50, "overt-guard-metrics.service": 20}
"""tenths, at most, as systemd-analyze of 252 counts them"""


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with programs that are there."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("not installed: systemd")
    for unit in UNITS.glob("overt-guard*"):
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/bin/overt", "/bin/true"))
    return tmp_path


def test_systemd_takes_the_units(units: Path) -> None:
    paths = sorted(map(str, units.iterdir()))
    assert any(path.endswith(".socket") for path in paths)
    words = ["systemd-analyze", "verify", "--man=no", *paths]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_socket_unit_that_is_restarted_does_not_end_the_guard() -> None:
    """Nothing that systemd would stop the service by, nor take its sockets' names away."""
    service, sockets = ((UNITS / f"overt-guard.{kind}").read_text() for kind in ("service", "socket"))
    assert not re.search("^(Requires|BindsTo|PartOf|Requisite)=", service, re.MULTILINE)
    assert "\nWants=overt-guard.socket\n" in service
    assert not re.search("^(RemoveOnStop|FlushPending)=", sockets, re.MULTILINE)


@pytest.mark.parametrize("unit", EXPOSURE)
def test_a_service_is_exposed_no_more_than_it_needs(units: Path, unit: str) -> None:
    words = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE[unit]}", str(units / unit)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout[-300:]


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[list[socket.socket]]:
    """The sockets of overt-guard.socket, as systemd opens them."""
    path = tmp_path / "guard"
    sockets = [supervisor.listen(path), supervisor.listen(supervisor.status_path(path))]
    yield sockets
    for each in sockets:
        each.close()


def start(path: Path, sockets: list[socket.socket]) -> "subprocess.Popen[bytes]":
    """`overt guard run` as systemd starts it."""
    fds = [str(each.fileno()) for each in sockets]
    # LISTEN_PID is the program's own: a shell becomes it.
    script = f'exec 3<&{fds[0]} 4<&{fds[1]}; LISTEN_FDS=2 LISTEN_PID=$$ exec "$@"'
    words = ["bash", "-c", script, "bash", sys.executable, "-m", "overt", "guard", "run", "-f", "--socket", str(path)]
    with open(path.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            words, pass_fds=[each.fileno() for each in sockets], stderr=log,
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
        )  # fmt: skip


@pytest.mark.root
def test_a_container_can_start_before_the_guard_and_its_call_waits(
    bare: Ground, listening: list[socket.socket], tmp_path: Path
) -> None:
    path = tmp_path / "guard"
    container = bare.container(guarded=True, wait=False)
    fd = container.open()
    container.say("syncfs", fd)
    time.sleep(0.2)
    process = start(path, listening)
    try:
        assert container.hear() == [0]
        wait_until(lambda: supervisor.ask(path)["overlays"], "the guard has taken the container")
        container.lose()
        assert [container.syncfs(fd), container.syncfs(fd)] == [EIO, 0]
        bare.end(container)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert path.exists()  # systemd's to remove
    process = start(path, listening)
    try:
        again = bare.container(guarded=True, wait=False)
        assert again.new_syncfs() == 0
        bare.end(again)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_descriptors_that_are_for_another_process_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getppid()))
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert activation.sockets() == {}
    assert "LISTEN_FDS" not in os.environ
