"""containerd, with the wrapper as its runc; and `overt guard check`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from overt.lab import Disk

from .daemons import SYNC, VOLUMES, Daemons, daemons, lose, why_not

pytestmark = [pytest.mark.root, pytest.mark.timeout(110)]


@pytest.fixture
def disk() -> Iterator[Disk]:
    problem = why_not("containerd", "ctr")
    if problem:
        pytest.skip(problem)
    with Disk("ext4", size=512 << 20) as made:
        yield made


def start(here: Daemons, name: str, binary: Path | str) -> None:
    volumes = [
        word for source, path in [*((path, path) for path in VOLUMES), (str(here.base), "/host")]
        for word in ("--mount", f"type=bind,src={source},dst={path},options=rbind:ro")
    ]  # fmt: skip
    image = "docker.io/library/tiny:latest"
    here.run("ctr", "run", "-d", "--runc-binary", str(binary), *volumes, image, name, "/bin/sleep", "99")


def execute(here: Daemons, name: str, *words: str, status: tuple[int, ...] = (0,)) -> str:
    return here.run("ctr", "task", "exec", "--exec-id", f"e{len(words)}", name, *words, status=status)


def test_containerds_containers_are_told_once_each_and_those_of_plain_runc_are_not(disk: Disk, tmp_path: Path) -> None:
    configuration = tmp_path / "config.toml"
    configuration.write_text('version = 2\ndisabled_plugins = ["io.containerd.internal.v1.opt"]')
    before = configuration.read_bytes()
    with daemons(disk) as here, here.guard() as guard:
        socket = ("--socket", str(guard.socket))
        here.overt("guard", "install", "containerd", "--directory", str(tmp_path), *socket)
        with here.containerd("--config", str(configuration)):
            binary = tmp_path / "overt-runc"
            assert f'BinaryName = "{binary}"' in here.run(
                "containerd", "--config", str(configuration), "config", "dump"
            )
            for name, program in (("one", binary), ("other", binary), ("plain", "runc")):
                start(here, name, program)
                assert execute(here, name, *SYNC) == ""
            lose(
                disk, ["ctr", "task", "exec", "--exec-id", "cp", "one", "/bin/sh", "-c", "cat </host/page >/lost"], here
            )
            for name in ("one", "other"):
                assert "Input/output error" in execute(here, name, *SYNC, status=(1,))
                assert execute(here, name, *SYNC) == ""
            assert execute(here, "plain", *SYNC) == ""
            said = here.overt("guard", "check", "containerd", "--runtime", str(binary), *socket)
            assert "containerd: protected" in said
            said = here.overt("guard", "check", "containerd", "--runtime", "/usr/sbin/runc", *socket, status=(1,))
            assert "NO  the guard has its listener" in said
            for name in ("one", "other", "plain"):
                here.run("ctr", "task", "rm", "-f", name)
                here.run("ctr", "container", "rm", name)
            assert guard.status()["crashes"] == 0
        here.overt("guard", "uninstall", "containerd", "--directory", str(tmp_path))
    assert configuration.read_bytes() == before
    assert not binary.exists()
