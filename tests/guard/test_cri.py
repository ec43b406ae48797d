"""Pods as the kubelet starts them: by a RuntimeClass's handler, and with a profile of the node's."""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from overt.lab import Disk

from .daemons import SYNC, daemons, why_not
from .ground import fail

pytest.importorskip("grpc", reason="not installed: grpcio")

from . import cri

pytestmark = [pytest.mark.root, pytest.mark.timeout(110)]
DEBIAN = Path("/usr/share/containers/seccomp.json")
IMAGE = "docker.io/library/tiny:latest"
CONFIGURATION = f"""\
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{IMAGE}"
  disable_apparmor = true
  restrict_oom_score_adj = true
"""


@pytest.fixture
def disk() -> Iterator[Disk]:
    problem = why_not("containerd", "ctr") or (None if DEBIAN.exists() else f"no {DEBIAN}")
    if problem:
        pytest.skip(problem)
    with Disk("ext4", size=512 << 20) as made:
        yield made


def test_messages_are_read_as_they_are_written() -> None:
    written = cri.encode([(1, "text"), (3, 300), (15, [(2, "deep")])])
    assert written == b"\x0a\x04text\x18\xac\x02\x7a\x06\x12\x04deep"
    assert cri.decode(written) == {1: b"text", 3: 300, 15: b"\x12\x04deep"}
    assert cri.decode(b"") == {}


def test_pods_by_handler_and_by_profile_are_told_once_each_and_others_are_not(disk: Disk, tmp_path: Path) -> None:
    configuration = tmp_path / "config.toml"
    configuration.write_text(CONFIGURATION)
    with daemons(disk) as here, here.guard() as guard:
        socket = ("--socket", str(guard.socket))
        here.overt("guard", "install", "containerd", "--directory", str(tmp_path), *socket)
        node = tmp_path / "overt-guard.json"
        node.write_text(here.overt("guard", "profile", "--oci", "--from", str(DEBIAN), *socket))
        with here.containerd("--config", str(configuration)), ExitStack() as stack:
            here.run("ctr", "-n", "k8s.io", "image", "import", str(here.base / "tiny-image.tar"))
            runtime = stack.enter_context(closing(cri.Runtime(str(here.base / "containerd.sock"))))
            made = {}
            for name, handler, seccomp in (
                ("handler", "overt", cri.RUNTIME_DEFAULT), ("handler-unset", "overt", None),
                ("profile", "", cri.localhost(str(node))), ("plain", "", cri.RUNTIME_DEFAULT),
            ):  # fmt: skip
                pod, made[name] = runtime.run_pod(name, handler, seccomp, IMAGE)
                stack.callback(runtime.remove, pod)
                assert runtime.execute(made[name], *SYNC) == (0, "")
            disk.fail("data")
            text = "".join(f"\\0{byte:03o}" for byte in disk.marker)
            script = f"for i in $(seq 300); do echo -n -e '{text}'; done >/lost"
            assert runtime.execute(made["handler"], "/bin/busybox", "sh", "-c", script)[0] == 0
            fail(disk)
            told = {name: [runtime.execute(each, *SYNC)[0] for _ in range(2)] for name, each in made.items()}
            assert told == {"handler": [1, 0], "handler-unset": [1, 0], "profile": [1, 0], "plain": [0, 0]}
            assert guard.status()["crashes"] == 0
