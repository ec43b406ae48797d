"""What the programs run on: a filesystem for layers, overlays on it, and commands that end in time.

The filesystem is an ext4 image of the session's own, in memory where there is enough, so that no fsync of a test waits
for the machine's disk. Each test has a server of its own; at its end every mount must come off without force, and the
server must not have logged an error of its own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from overt.host import mounts
from overt.lab.filesystems import FILESYSTEMS, program
from overt.server.client import Client, Started, start

NOBODY = 65534
MOSTLY_PASSTHROUGH = pytest.mark.parametrize(
    "data_path",
    [pytest.param("", id="passthrough"), pytest.param("nopassthrough", id="nopassthrough", marks=pytest.mark.long)],
    indirect=True,
)
_WITHOUT_SYNC = [sys.executable, "-I", "-S", str(Path(__file__).with_name("without_sync.py"))]
_UNEXPECTED = ("internal error", "reply refused by the kernel", "refused", "cursor not set", "file lost")
_TAIL = 4000  # characters of a failed command's output that are shown
_GIB = 1 << 30


class Failed(AssertionError):
    """A command that ended badly, or did not end."""


def prefix(user: int | None) -> list[str]:
    """What stands before every command: no sync(2), and `user` (a uid, its group of the same number) if not root."""
    if user is None:
        return _WITHOUT_SYNC
    return [*_WITHOUT_SYNC, "setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]


def run(
    *command: str | os.PathLike[str],
    cwd: str | os.PathLike[str] = "/",
    timeout: float = 60.0,
    user: int | None = None,
    env: Mapping[str, str] | None = None,
    given: bytes = b"",
    status: Sequence[int] = (0,),
) -> str:
    """Run a command, `given` on its standard input; return what it printed (standard error too).

    `timeout` in seconds; then the whole process group is killed. `env` is added to ours. Raises Failed if its exit
    status is not among `status`.
    """
    words = [os.fspath(word) for word in command]
    # Files, not pipes: whatever a command leaves running in the background must not keep us waiting.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as source:
        source.write(given)
        source.seek(0)
        process = subprocess.Popen(
            [*prefix(user), *words],
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
            stdin=source,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            ended = process.wait(timeout)
        except subprocess.TimeoutExpired:
            ended = -signal.SIGKILL
        finally:
            kill_group(process)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if ended not in status:
        why = f"did not end within {timeout:.0f} s" if ended == -signal.SIGKILL else f"ended with status {ended}"
        raise Failed(f"{' '.join(words)[:400]}\n{why}:\n{text[-_TAIL:]}")
    return text


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    """End a session leader and what it has left running in its process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


class Overlay(NamedTuple):
    """A mounted overlay."""

    path: Path
    lower: Path
    upper: Path
    work: Path
    options: str


class Ground:
    """A directory on a filesystem that can carry layers, and overlays on it served by one server."""

    def __init__(self, directory: Path, server: Started, client: Client) -> None:
        self.directory = directory
        self.server = server
        self.client = client
        self.mounted: list[Overlay] = []

    def overlay(self, lower: Path | None = None, options: str = "") -> Overlay:
        """Mount a new overlay with a new upper over `lower` (an empty directory if None); `options` as for mount -o."""
        place = self.directory / f"overlay{len(self.mounted)}"
        made = Overlay(place / "mnt", lower or place / "lower", place / "upper", place / "work", options)
        for directory in (place, made.path, made.upper, made.work, place / "lower"):
            directory.mkdir(mode=0o755)
        self.remount(made)
        self.mounted.append(made)
        return made

    def remount(self, overlay: Overlay) -> None:
        """Mount an overlay whose mount is gone."""
        words = f"lowerdir={overlay.lower},upperdir={overlay.upper},workdir={overlay.work}"
        self.client.mount(str(overlay.path), f"{words},{overlay.options}" if overlay.options else words)

    def umount(self, overlay: Overlay, patience: float = 10.0) -> None:
        """Unmount; what still uses it (a process that is ending) has `patience` seconds."""
        deadline = time.monotonic() + patience
        while os.path.ismount(overlay.path):
            try:
                self.client.umount(str(overlay.path))
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def events(self, *kinds: str) -> list[str]:
        """The events of these kinds, one text each."""
        return [json.dumps(event, indent=1) for event in self.client.events() if event["event"] in kinds]


@contextmanager
def image(filesystem: str, size: int) -> Iterator[Path]:
    """A new filesystem (a row of the lab's) of up to `size` bytes, mounted; its memory or disk space is given back."""
    shared = "/dev/shm"
    roomy = os.path.isdir(shared) and shutil.disk_usage(shared).free >= 3 * _GIB
    with tempfile.TemporaryDirectory(prefix="overt-programs-", dir=shared if roomy else None) as directory:
        os.chmod(directory, 0o755)
        file, point = Path(directory, "image"), Path(directory, "mnt")
        size = min(size, shutil.disk_usage(directory).free * 3 // 4)
        row = FILESYSTEMS[filesystem]
        with open(file, "wb") as new:
            new.truncate(size)
        point.mkdir()
        run(program(row.make[0], row.package), *row.make[1:], file, timeout=120)
        run("mount", "-o", f"loop,discard,{row.mount_options}", file, point)
        try:
            yield point
        finally:
            mounts.umount(point, mounts.MNT_DETACH)


@contextmanager
def ground(directory: Path, log: Path, expected: Collection[str] = ()) -> Iterator[Ground]:
    """A Ground on `directory`, with a server that logs to `log`; at the end everything is unmounted and removed.

    Events that no healthy mount has fail the test, but those of the kinds `expected`.
    """
    server = start(str(directory / "socket"), log=str(log))
    try:
        with Client(server.path) as client:
            made = Ground(directory, server, client)
            try:
                yield made
                for overlay in made.mounted:
                    made.umount(overlay)
                unexpected = made.events(*(kind for kind in _UNEXPECTED if kind not in expected))
                assert not unexpected, "\n".join(unexpected[:5])
            finally:
                for overlay in made.mounted:
                    if os.path.ismount(overlay.path):  # the test failed: by force
                        mounts.umount(overlay.path, mounts.MNT_DETACH)
    finally:
        server.stop()
        run("rm", "-rf", directory, timeout=120)  # shutil.rmtree gives up on what stress-ng nests
