"""`overt guard check` with runc, crun and podman: it says what is so, and why not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.containers import engine as place

from .ground import RUNTIMES, SOURCE, Guard, wait_until, why_not

pytestmark = [pytest.mark.root, pytest.mark.timeout(110)]


class Checker:
    """A mount namespace as runtimes like it, and the socket of the guard that may run there."""

    def __init__(self, holder: int, socket: Path) -> None:
        self.prefix = ["nsenter", "-t", str(holder), "-m"]
        self.socket = socket

    def start(self, engine: str, **environment: str) -> "subprocess.Popen[str]":
        words = [*self.prefix, sys.executable, "-m", "overt", "guard", "check", engine, "--json"]
        return subprocess.Popen(
            [*words, "--socket", str(self.socket)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(SOURCE), **environment},
        )  # fmt: skip

    def check(self, engine: str, **environment: str) -> tuple[int, dict[str, Any]]:
        """Its exit status, and its report."""
        with self.start(engine, **environment) as done:
            out, err = done.communicate(timeout=90)
        assert err == ""
        report = json.loads(out)
        assert done.returncode == {True: 0, False: 1, None: 3}[report["protected"]]
        return done.returncode, report


@pytest.fixture
def checker(tmp_path: Path) -> Iterator[Checker]:
    problem = why_not(*RUNTIMES)
    if problem:
        pytest.skip(problem)
    with place.held(place.HOLD) as holder:
        yield Checker(holder, tmp_path / "guard")


@pytest.fixture
def guarded(checker: Checker) -> Iterator[Checker]:
    guard = Guard(checker.socket, prefix=checker.prefix)
    try:
        yield checker
        status = guard.status()
        assert (status["crashes"], status["containers"]) == (0, [])
    finally:
        assert guard.stop() == 0


def failed(report: dict[str, Any]) -> dict[str, Any]:
    """The step at which it ended."""
    step = report["steps"][-1]
    assert step["ok"] is False, report
    return dict(step)


def test_without_a_guard_a_container_is_not_protected(checker: Checker) -> None:
    status, report = checker.check("runc")
    assert status == 1
    assert failed(report)["name"] == "a guard runs"


@pytest.mark.parametrize("engine", RUNTIMES)
def test_a_guarded_container_is_told_once(guarded: Checker, engine: str) -> None:
    status, report = guarded.check(engine)
    assert status == 0, report
    assert [step["name"] for step in report["steps"][-2:]] == ["a lost write is told", "once"]
    assert all(step["ok"] for step in report["steps"])


def test_where_no_disk_can_be_made_to_fail_it_says_that_this_was_not_tried(guarded: Checker) -> None:
    mkfs = str(shutil.which("mkfs.ext4", path="/usr/sbin:/sbin"))
    subprocess.run([*guarded.prefix, "mount", "--bind", "/dev/null", mkfs], check=True, timeout=30)
    status, report = guarded.check("runc")
    assert status == 0, report
    assert report["steps"][-1]["name"] == "a lost write is told"
    assert report["steps"][-1]["ok"] is None
    assert "no disk of the lab's" in report["steps"][-1]["why"]


def runtime(directory: Path, script: str) -> dict[str, str]:
    """The environment in which this is runc."""
    runc = directory / "runc"
    runc.write_text(f"#!/bin/sh\n{script}\n")
    runc.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def test_of_a_container_that_does_not_start_nothing_is_known_and_the_runtime_is_quoted(
    guarded: Checker, tmp_path: Path
) -> None:
    status, report = guarded.check("runc", **runtime(tmp_path, "echo out of order >&2; exit 3"))
    assert (status, report["protected"]) == (3, None)
    assert report["steps"][-1] == {"name": "a container starts", "ok": None, "why": "out of order"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_check_that_is_ended_leaves_nothing(guarded: Checker, tmp_path: Path, number: int) -> None:
    started, temporary = tmp_path / "started", tmp_path / "temporary"
    temporary.mkdir()
    script = f'case "$*" in *" run "*) touch {started}; exec sleep 60;; *" delete "*) touch {tmp_path}/deleted;; esac'
    with guarded.start("runc", TMPDIR=str(temporary), **runtime(tmp_path, script)) as check:
        wait_until(started.exists, "the container is being started")
        check.send_signal(number)
        check.communicate(timeout=30)
        assert check.returncode == (130 if number == signal.SIGINT else 128 + number)
    assert (tmp_path / "deleted").exists()
    assert os.listdir(temporary) == []
    assert "overt-check" not in Path(f"/proc/{guarded.prefix[2]}/mountinfo").read_text()


def test_podman_is_protected_when_the_guard_is_installed_into_it_and_not_before(
    guarded: Checker, tmp_path: Path
) -> None:
    problem = place.why_not()
    if problem or not Path("/usr/share/containers/seccomp.json").exists():
        pytest.skip(problem or "no /usr/share/containers/seccomp.json")
    base = tmp_path / "e"
    place._write(base, sys.executable, on_kernel=True)
    environment = {
        "CONTAINERS_STORAGE_CONF": str(base / "storage.conf"), "CONTAINERS_CONF": str(base / "containers.conf")
    }  # fmt: skip
    status, report = guarded.check("podman", **environment)
    assert status == 1
    assert failed(report)["name"] == "the guard has its listener"
    assert "overt guard install podman" in failed(report)["why"]
    words = ["guard", "install", "podman", "--directory", str(tmp_path), "--socket", str(guarded.socket)]
    subprocess.run(
        [sys.executable, "-m", "overt", *words], check=True, timeout=30, env={**os.environ, "PYTHONPATH": str(SOURCE)}
    )
    configuration = base / "containers.conf"
    drop_in = (tmp_path / "containers.conf.d/overt-guard.conf").read_text()
    configuration.write_text(configuration.read_text().replace("[containers]\n", drop_in))
    status, report = guarded.check("podman", **environment)
    assert status == 0, report
    assert report["steps"][-1]["name"] == "once"
