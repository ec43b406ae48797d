"""Docker's and containerd's daemons, in a place of their own (tests/containers/engine.py), with everything on one disk.

`overt-runc` is on the PATH there as an installed one would be. The image `tiny` is in both; programs in containers are
the machine's, by volumes, as busybox's sync(1) throws the answer away.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.containers import engine as place

from overt.lab import Disk

from .ground import SOURCE, Guard, fail

SYNC = ("/usr/bin/sync", "-f", "/")
VOLUMES = [path for path in ("/usr", "/lib", "/lib64") if os.path.exists(path)]
_SECONDS = 60.0


def why_not(*programs: str) -> str | None:
    """Why there can be no daemon here, if so."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name in (*programs, "runc", "nsenter") if shutil.which(name) is None]
    if not os.path.exists(place.BUSYBOX):
        missing.append("busybox-static")
    return f"not installed: {', '.join(missing)} (tools/debian-packages daemons)" if missing else None


class Daemons:
    """See above. `base` is on the disk."""

    def __init__(self, base: Path, holder: int) -> None:
        self.base = base
        self.prefix = ["nsenter", "-t", str(holder), "-m"]
        self.environment = {
            "PATH": f"{base}/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(base), "LC_ALL": "C.UTF-8",
            "DOCKER_HOST": f"unix://{base}/docker.sock", "CONTAINERD_ADDRESS": str(base / "containerd.sock"),
            "CONTAINERD_SNAPSHOTTER": "overlayfs", "PYTHONPATH": str(SOURCE),
        }  # fmt: skip
        (base / "bin").mkdir(parents=True)
        place.write_program(base / "bin/overt-runc", "guard.wrapper")
        place.write_image(base / "tiny.tar")

    def run(self, *words: str, status: Sequence[int] = (0,)) -> str:
        """Run a command there; what it printed. Its exit status has to be among `status`."""
        # A file, as containers and shims that go on would keep a pipe open.
        with open(self.base / "out", "w+b") as out:
            done = subprocess.run(
                [*self.prefix, *words], env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                timeout=_SECONDS, check=False, cwd="/",
            )  # fmt: skip
            out.seek(0)
            text = out.read().decode(errors="replace")
        assert done.returncode in status, f"{' '.join(words)}: status {done.returncode}\n{text}"
        return text

    def overt(self, *words: str, status: Sequence[int] = (0,)) -> str:
        """Run overt there."""
        return self.run(sys.executable, "-m", "overt", *words, status=status)

    @contextmanager
    def daemon(self, name: str, *words: str, ready: Sequence[str]) -> Iterator[None]:
        """A daemon, from when the command `ready` succeeds."""
        with open(self.base / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                [*self.prefix, name, *words], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd="/",
            )  # fmt: skip
        try:
            deadline = time.monotonic() + _SECONDS
            while subprocess.run([*self.prefix, *ready], env=self.environment, capture_output=True).returncode:
                said = (self.base / f"{name}.log").read_text()[-2000:]
                assert process.poll() is None and time.monotonic() < deadline, said
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait(_SECONDS)

    @contextmanager
    def containerd(self, *words: str) -> Iterator[None]:
        """containerd, with the image `tiny`; `words`: options of the daemon's."""
        options = ["-a", str(self.base / "containerd.sock"), "--root", str(self.base / "cd"), "--state", "/run/cd"]
        with self.daemon("containerd", *words, *options, ready=["ctr", "version"]):
            archive = self.base / "tiny-image.tar"
            write_archive(archive, self.base / "tiny.tar")
            self.run("ctr", "image", "import", str(archive))
            yield

    @contextmanager
    def docker(self, configuration: Path) -> Iterator[None]:
        """dockerd, with the image `tiny`."""
        options = [
            "--config-file", str(configuration), "--data-root", str(self.base / "docker"), "--exec-root", "/run/docker",
            "-p", "/run/docker.pid", "-H", f"unix://{self.base}/docker.sock",
            "--containerd", str(self.base / "containerd.sock"), "--storage-driver=overlay2", "--bridge=none",
            "--iptables=false", "--ip6tables=false", "--ip-forward=false",
        ]  # fmt: skip
        with self.daemon("dockerd", *options, ready=["docker", "version"]):
            self.run("docker", "import", str(self.base / "tiny.tar"), "tiny")
            yield

    @contextmanager
    def guard(self) -> Iterator[Guard]:
        """A guard that sees what the daemons mount."""
        made = Guard(self.base / "guard", prefix=self.prefix)
        try:
            yield made
        finally:
            assert made.stop() == 0


def remove(here: Daemons, name: str) -> None:
    """End a container of containerd's, and take it away."""
    here.run("ctr", "task", "rm", "-f", name)
    here.run("ctr", "container", "rm", name)


def lose(disk: Disk, write: Sequence[str], here: Daemons) -> None:
    """Lose a page that the command `write`, given the page as a file, writes in a container."""
    page = here.base / "page"
    page.write_bytes(disk.marker * 256)
    with open(page, "rb+") as file:
        os.fsync(file)
    disk.fail("data")
    here.run(*write)
    fail(disk)


def write_archive(file: Path, layer: Path) -> None:
    """An image as `docker save` writes it."""
    config = json.dumps({
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine], "os": "linux",
        "config": {"Cmd": ["/bin/sleep", "600"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer.read_bytes()).hexdigest()}"]},
    })  # fmt: skip
    manifest = json.dumps([{"Config": "config.json", "RepoTags": ["tiny:latest"], "Layers": ["layer.tar"]}])
    with tarfile.open(file, "w") as tar:
        for name, text in (("config.json", config), ("manifest.json", manifest)):
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
        tar.add(layer, "layer.tar")


@contextmanager
def daemons(disk: Disk) -> Iterator[Daemons]:
    """The place; daemons are started in it."""
    with ExitStack() as stack:
        yield Daemons(Path(disk.path, "e"), stack.enter_context(place.held(place.HOLD)))
