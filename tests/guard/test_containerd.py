"""containerd, with the wrapper as its runc; and `overt guard check`."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from overt.lab import Disk

from .daemons import SYNC, VOLUMES, Daemons, daemons, lose, remove, why_not

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
    binary = tmp_path / "overt-runc"
    with daemons(disk) as here, here.guard() as guard:
        socket = ("--socket", str(guard.socket))
        here.overt("guard", "install", "containerd", "--directory", str(tmp_path), *socket)
        with here.containerd("--config", str(configuration)), ExitStack() as stack:
            dump = here.run("containerd", "--config", str(configuration), "config", "dump")
            assert f'BinaryName = "{binary}"' in dump
            plugins = here.run("ctr", "plugins", "ls")  # CRI, too: it wants a `runc` beside ours
            assert re.search(r"^io\.containerd\.grpc\.v1 +cri +\S+ +ok", plugins, re.MULTILINE), plugins
            for name, program in (("one", binary), ("other", binary), ("plain", "runc")):
                start(here, name, program)
                stack.callback(remove, here, name)
                assert execute(here, name, *SYNC) == ""
            write = ("/bin/sh", "-c", "cat </host/page >/lost")
            lose(disk, ["ctr", "task", "exec", "--exec-id", "w", "one", *write], here)
            for name in ("one", "other"):
                assert "Input/output error" in execute(here, name, *SYNC, status=(1,))
                assert execute(here, name, *SYNC) == ""
            assert execute(here, "plain", *SYNC) == ""
            said = here.overt("guard", "check", "containerd", "--runtime", str(binary), *socket)
            assert "containerd: protected" in said
            said = here.overt("guard", "check", "containerd", "--runtime", "/usr/sbin/runc", *socket, status=(1,))
            assert "NO  the guard has its listener" in said
            assert guard.status()["crashes"] == 0
        here.overt("guard", "uninstall", "containerd", "--directory", str(tmp_path))
    assert configuration.read_bytes() == before
    assert not binary.exists()
