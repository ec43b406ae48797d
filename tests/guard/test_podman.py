"""podman on the kernel's overlayfs, in a place of its own, with the guard's profile made from the distribution's."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.containers import engine as podman

from overt.lab import Disk

from .ground import SOURCE, Guard, fail, wait_until

pytestmark = [pytest.mark.root, pytest.mark.timeout(110)]

PROFILE = Path("/usr/share/containers/seccomp.json")


@pytest.fixture
def disk() -> Iterator[Disk]:
    problem = "needs root" if os.geteuid() != 0 else podman.why_not()
    if problem or not PROFILE.exists():
        pytest.skip(problem or f"no {PROFILE}")
    with Disk("ext4", size=512 << 20) as made:
        yield made


def install(directory: Path, socket: Path) -> None:
    """Make the profile of the distribution's, and the piece of containers.conf that names it."""
    words = ["guard", "install", "podman", "--directory", str(directory), "--socket", str(socket)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    subprocess.run([sys.executable, "-m", "overt", *words], check=True, timeout=30, env=environment)


def tools() -> list[str]:
    """Volumes with the machine's own sync(1): busybox's throws the answer away."""
    return [word for path in ("/usr", "/lib", "/lib64") if os.path.exists(path) for word in ("-v", f"{path}:{path}:ro")]


def test_podmans_containers_are_told_once_each_by_run_and_by_exec(disk: Disk, tmp_path: Path) -> None:
    """As `overt guard install podman` sets it up: for every container, without an option."""
    guard = Guard(tmp_path / "guard")
    try:
        with podman.engine(Path(disk.path, "e"), shared=False, on_kernel=True) as engine:
            install(tmp_path, guard.socket)
            configuration = Path(engine.environment["CONTAINERS_CONF"])
            drop_in = (tmp_path / "containers.conf.d/overt-guard.conf").read_text()
            configuration.write_text(configuration.read_text().replace("[containers]\n", drop_in))
            for name in ("one", "other"):
                engine.podman("run", "-d", "--name", name, *tools(), "tiny", "sleep", "1000")
            sync = ("/usr/bin/sync", "-f", "/")
            assert engine.podman("exec", "one", *sync) == ""
            disk.fail("data")
            engine.podman("exec", "-i", "one", "sh", "-c", "cat >/lost", given=disk.marker * 4096)
            fail(disk)
            for name in ("one", "other"):
                assert "Input/output error" in engine.podman("exec", name, *sync, status=(1,))
                assert engine.podman("exec", name, *sync) == ""
            guarded = [each for each in guard.status()["overlays"] if each["told"]]
            assert len(guarded) == 2
            wait_until(lambda: guard.events("file lost"), "the file is named")
            (lost,) = guard.events("file lost")
            assert (lost["path"], lost["container"]) == (
                "/lost",
                engine.podman("inspect", "-f", "{{.Id}}", "one").strip(),
            )
            assert "tiny" in lost["image"]
    finally:
        assert guard.stop() == 0
