"""Units, as systemd reads them, and sockets that systemd has opened: what runtimes say waits for the guard."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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


_MANAGER = """
set -e
mount -t cgroup2 none "$1/cgroup"
mkdir "$1/cgroup/$2"
echo $$ >"$1/cgroup/$2/cgroup.procs"
mount -t tmpfs none /run
mkdir -p /run/systemd/system
exec >"$1/log" 2>&1
exec unshare -C sh -c 'umount -l /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; exec systemd --user'
"""
"""A user's systemd in namespaces and a cgroup of its own, on a machine that another init has booted, or a systemd."""


@pytest.fixture
def systemctl(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Asks a systemd that has the units, without what needs the machine's; sockets in `tmp_path`/overt."""
    if os.geteuid() != 0 or shutil.which("systemd") is None:
        pytest.skip("needs root and systemd")
    units = tmp_path / "systemd/user"
    for directory in (tmp_path / "cgroup", tmp_path / "run", units):
        directory.mkdir(parents=True)
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={SOURCE} exec {sys.executable} -m overt "$@"\n')
    program.chmod(0o755)
    kept = re.compile(r"\[|(Type|Exec\w+|Listen\w+|\w*Mode|Requires|Wants|After|Before|BindsTo|PartOf|RemoveOnStop)=")
    for unit in UNITS.glob("overt-guard.*"):
        text = unit.read_text().replace("/usr/bin/overt", str(program)).replace("/run/overt", f"{tmp_path}/overt")
        (units / unit.name).write_text("".join(line for line in text.splitlines(True) if kept.match(line)))
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "run"), "XDG_CONFIG_HOME": str(tmp_path)}
    name = f"overt-test-{os.getpid()}"
    manager = subprocess.Popen(["unshare", "-m", "sh", "-c", _MANAGER, "sh", str(tmp_path), name], env=environment)

    def ask(*words: str) -> str:
        command = ["systemctl", "--user", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False, env=environment)
        return done.stdout.strip()

    try:
        wait_until(lambda: ask("show", "-p", "Version") or manager.poll() is not None, "systemd")
        if manager.poll() is not None:
            pytest.skip(f"no systemd can be started: {(tmp_path / 'log').read_text()[-300:]}")
        yield ask
    finally:
        if manager.poll() is None:
            ask("stop", "overt-guard.socket", "overt-guard.service")
            manager.terminate()
        manager.wait(30)
        _remove_cgroup(tmp_path / "cgroup", name)


def _remove_cgroup(place: Path, name: str) -> None:
    script = 'mount -t cgroup2 none "$1" && find "$1/$2" -depth -type d -exec rmdir {} +'
    subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", str(place), name], check=False, timeout=20)


@pytest.mark.root
@pytest.mark.timeout(100)
def test_a_socket_unit_that_is_stopped_or_restarted_leaves_the_guard_as_it_is(
    systemctl: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "overt/guard.sock"
    systemctl("start", "overt-guard.service")
    pid = systemctl("show", "-p", "MainPID", "--value", "overt-guard.service")
    assert systemctl("is-active", "overt-guard.service", "overt-guard.socket") == "active\nactive"
    for change in ("restart", "stop"):
        systemctl(change, "overt-guard.socket")
        assert systemctl("show", "-p", "MainPID", "--value", "overt-guard.service") == pid
        assert str(supervisor.ask(path)["supervisor"]) == pid and path.exists()
    systemctl("restart", "overt-guard.service")
    assert systemctl("is-active", "overt-guard.service", "overt-guard.socket") == "active\nactive"
    assert str(supervisor.ask(path)["supervisor"]) != pid


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
