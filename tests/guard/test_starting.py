"""How `overt guard run` starts, and what it refuses."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from overt.guard import supervisor

from .ground import SOURCE


def run(*words: str, prefix: Sequence[str] = ()) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*prefix, sys.executable, "-m", "overt", "guard", "run", "-f", *words], capture_output=True, text=True,
        timeout=30, check=False, env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["guard", "guard.status"])
def test_a_file_that_is_no_socket_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    done = run("--socket", str(tmp_path / "guard"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"overt: there is a file that is not a socket: {tmp_path / name}"
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "precious"


def test_what_is_left_of_a_guard_that_was_killed_is_replaced_and_one_that_lives_is_not(tmp_path: Path) -> None:
    path = tmp_path / "guard"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(path))
    with supervisor.listen(path):
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(OSError, match="a guard listens already"):
            supervisor.listen(path)
        assert path.is_socket()


@pytest.mark.parametrize(
    ("path", "why"), [("no-such/guard", "No such file or directory"), ("x" * 120, "AF_UNIX path too long")]
)
def test_a_place_where_no_socket_can_be_is_named(tmp_path: Path, path: str, why: str) -> None:
    done = run("--socket", str(tmp_path / path))
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, f"overt: {why}: {tmp_path / path}")


def test_a_descriptor_that_is_not_there_leaves_no_sockets(tmp_path: Path) -> None:
    done = run("--socket", str(tmp_path / "guard"), "--ready-fd", "77")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "overt: --ready-fd 77: Bad file descriptor")
    assert os.listdir(tmp_path) == []


@pytest.mark.root
def test_who_is_not_wholly_root_is_told_what_is_missing(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    without = ("setpriv", "--bounding-set=-sys_admin")
    done = run("--socket", str(tmp_path / "guard"), "--ready-fd", "77", prefix=without)
    assert "not root" in done.stderr and "sys_admin" in done.stderr
