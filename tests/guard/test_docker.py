"""Docker's daemon, which drops listenerPath, with the wrapper as its runtime; and `overt guard check`."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from overt.lab import Disk

from .daemons import SYNC, VOLUMES, Daemons, daemons, lose, why_not

pytestmark = [pytest.mark.root, pytest.mark.timeout(110)]
ORIGINAL = '{"log-level": "warn",  "features": {"buildkit": true}}'


@pytest.fixture
def disk() -> Iterator[Disk]:
    problem = why_not("dockerd", "docker", "containerd", "ctr")
    if problem:
        pytest.skip(problem)
    with Disk("ext4", size=512 << 20) as made:
        yield made


def start(here: Daemons, name: str, *words: str) -> None:
    volumes = [word for path in VOLUMES for word in ("-v", f"{path}:{path}:ro")]
    page = ("-v", f"{here.base}:/host:ro")
    here.run("docker", "run", "-d", "--name", name, "--network", "none", *words, *volumes, *page, "tiny", "sleep", "99")


def test_dockers_containers_are_told_once_each_and_those_of_plain_runc_are_not(disk: Disk, tmp_path: Path) -> None:
    configuration = tmp_path / "daemon.json"
    configuration.write_text(ORIGINAL)
    with daemons(disk) as here, here.guard() as guard, here.containerd():
        said = here.overt(
            "guard", "install", "docker", "--default", "--directory", str(tmp_path), "--socket", str(guard.socket)
        )
        assert "systemctl reload docker" in said
        with here.docker(configuration), ExitStack() as stack:
            stack.callback(here.run, "docker", "rm", "-f", "ordinary", "unconfined", "plain", status=(0, 1))
            start(here, "ordinary")
            start(here, "unconfined", "--security-opt", "seccomp=unconfined")
            start(here, "plain", "--runtime", "runc")
            guarded = ("ordinary", "unconfined")
            for name in (*guarded, "plain"):
                assert here.run("docker", "exec", name, *SYNC) == ""
            lose(disk, ["docker", "exec", "ordinary", "sh", "-c", "cat </host/page >/lost", "/lost"], here)
            for name in guarded:
                assert "Input/output error" in here.run("docker", "exec", name, *SYNC, status=(1,))
                assert here.run("docker", "exec", name, *SYNC) == ""
            assert here.run("docker", "exec", "plain", *SYNC) == ""
            socket = ("--socket", str(guard.socket))
            assert "docker: protected" in here.overt("guard", "check", "docker", *socket)
            report = json.loads(
                here.overt("guard", "check", "docker", "--runtime", "runc", "--json", *socket, status=(1,))
            )
            assert not report["protected"]
            assert report["steps"][-1]["name"] == "the guard has its listener"
            assert guard.status()["crashes"] == 0
        here.overt("guard", "uninstall", "docker", "--directory", str(tmp_path))
    assert configuration.read_text() == ORIGINAL
