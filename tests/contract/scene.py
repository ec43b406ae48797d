"""A disk that fails on demand, overt mounts whose uppers are on it, and whoever asks whether data is safe.

The disk, the mounts and the errors are real. A server is started as a user starts one, from the command line; where a
test has to show that a mechanism matters, the server begins by switching it off (tests/contract/switches.py).
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import overt
from overt.host import files, mounts
from overt.lab import Disk
from overt.server.client import Client, ServerError
from overt.upper.eyes import superblock

from .container import Container

HERE = Path(__file__).parent
SOURCE = Path(overt.__file__).parent.parent
PAGE = 4096
SIZE = 64 << 20
"""bytes of a disk; xfs and btrfs take more"""
EIO = 5

_RUN = (
    "import sys; sys.path[:0] = sys.argv[1:3]; import switches; switches.turn_off(sys.argv[3]); "
    "from overt.cli.main import run; sys.exit(run(sys.argv[4:]))"
)


def told(call: Callable[..., object], *args: object) -> int:
    """The errno that the call raises, or 0."""
    try:
        call(*args)
    except OSError as error:
        return error.errno or -1
    return 0


def syncfs(fd: int) -> int:
    return told(files.syncfs, fd)


def fsync(fd: int) -> int:
    return told(os.fsync, fd)


def overt_command(*words: str, off: str = "") -> list[str]:
    """The command line of `overt WORDS`, with mechanisms switched off (names from switches.py, comma-separated)."""
    return [sys.executable, "-c", _RUN, str(SOURCE), str(HERE), off, *words]


def run_overt(*words: str, off: str = "", seconds: float = 60.0, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run an `overt` command to its end."""
    return subprocess.run(
        overt_command(*words, off=off), capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL,
        check=False, **options,
    )  # fmt: skip


class Server:
    """`overt serve`, with a log that a test can read."""

    def __init__(self, directory: Path, off: str = "", stderr: int | None = None) -> None:
        """`stderr`: what it says goes there, and not to the log."""
        directory.mkdir()
        self.off = off
        self.socket = directory / "socket"
        self.log = directory / "log"
        ready, tell = os.pipe()
        try:
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(
                    overt_command("serve", "-f", "--socket", str(self.socket), "--ready-fd", str(tell), off=off),
                    pass_fds=[tell], stdin=subprocess.DEVNULL, stdout=log,
                    stderr=log if stderr is None else stderr,
                )  # fmt: skip
        finally:
            os.close(tell)
        try:
            came = select.select([ready], [], [], 60.0)[0] and os.read(ready, 1)
        finally:
            os.close(ready)
        if not came:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"no server: {self.log.read_text()}")
        self.client = Client(self.socket)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def upper_status(self, device: str = "") -> dict[str, Any]:
        """What `overt status` says of an upper, or of the only one."""
        (upper,) = [upper for upper in self.client.status()["uppers"] if device in ("", upper["device"])]
        return dict(upper)

    def kill(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End it as SIGTERM does."""
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server did not end: {self.log.read_text()[-2000:]}") from None


class Overlay:
    """One mount. Files in it are opened as any program does."""

    def __init__(self, scene: "Scene", number: int, target: Path, volatile: bool) -> None:
        self.scene = scene
        self.volatile = volatile
        self.target = target
        self.upper = scene.root / f"upper-{number}"
        self.work = scene.root / f"work-{number}"

    def open(self, name: str = ".", flags: int = os.O_RDONLY) -> int:
        """Open a file; closed at the end of the test."""
        return self.scene.keep(os.open(self.target / name, flags | os.O_CLOEXEC, 0o644))

    def new_syncfs(self, name: str = ".") -> int:
        """What syncfs says on a descriptor opened just now."""
        fd = os.open(self.target / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return syncfs(fd)
        finally:
            os.close(fd)

    def new_fsync(self, name: str) -> int:
        fd = os.open(self.target / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return fsync(fd)
        finally:
            os.close(fd)

    def write(self, name: str, *, data: bytes | None = None) -> int:
        """Write a page that can be made to fail; the descriptor."""
        fd = self.open(name, os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, self.scene.page if data is None else data, 0)
        return fd

    def lose(self, name: str = "victim") -> int:
        """Write a page, and let its write-back fail; nobody has been told yet. The descriptor that wrote."""
        fd = self.write(name)
        self.scene.fail()
        return fd

    def umount(self) -> dict[str, Any]:
        """Unmount it; the record of its errors."""
        record = self.scene.server.client.umount(str(self.target))
        self.scene.overlays.remove(self)
        return record


class Scene:
    """One failing disk with one server's mounts on it."""

    def __init__(self, filesystem: str, server: Server, stack: ExitStack, **disk: Any) -> None:
        self.server = server
        self.base = Path(tempfile.mkdtemp(prefix="overt-contract-"))
        stack.callback(shutil.rmtree, self.base)
        self.disk = stack.enter_context(Disk(filesystem, **{"size": SIZE, **disk}))
        self.root = Path(self.disk.path)
        self.page = self.disk.marker * (PAGE // len(self.disk.marker))
        self.lower = self.base / "lower"
        self.lower.mkdir()
        self.overlays: list[Overlay] = []
        self._stack = stack
        self._fds: list[int] = []
        self.containers: list[Container] = []
        self._count = 0
        self._since = time.time()
        stack.callback(self._end)

    def keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def close(self, fd: int) -> None:
        self._fds.remove(fd)
        os.close(fd)

    def container(self, enter: Callable[[], None] = lambda: None, *, pid_namespace: bool = False) -> Container:
        """A process apart (container.py); it ends with the test."""
        container = Container(enter, pid_namespace=pid_namespace)
        self.containers.append(container)
        return container

    def make(self, *, volatile: bool = False) -> tuple[Overlay, str]:
        """The directories of an overlay, and its options."""
        self._count += 1
        overlay = Overlay(self, self._count, self.base / f"mnt-{self._count}", volatile)
        for path in (overlay.target, overlay.upper, overlay.work):
            path.mkdir()
        options = f"lowerdir={self.lower},upperdir={overlay.upper},workdir={overlay.work}"
        return overlay, options + (",volatile" if volatile else "")

    def overlay(self, extra: str = "", *, volatile: bool = False) -> Overlay:
        """Mount one."""
        overlay, options = self.make(volatile=volatile)
        overlay_options = f"{options},{extra}" if extra else options
        self.notices = self.server.client.mount(str(overlay.target), overlay_options)
        self.overlays.append(overlay)
        return overlay

    def detached(self, extra: str = "") -> tuple[int, Overlay]:
        """A mount without a place: its descriptor, to be closed with the others."""
        overlay, options = self.make()
        fd = self.server.client.mount_detached(f"{options},{extra}" if extra else options, f"{overlay.target}-nowhere")
        return self.keep(fd), overlay

    def kernel_overlay(self, overlay: Overlay, *flags: str) -> None:
        """Have the kernel mount the directories of an overlay, out of sight; OSError as it refuses them."""
        options: list[tuple[str, str | int | None]] = [
            ("lowerdir", str(self.lower)), ("upperdir", str(overlay.upper)), ("workdir", str(overlay.work)),
        ]  # fmt: skip
        os.close(mounts.new_mount("overlay", [*options, *((flag, None) for flag in flags)]))

    def again(self, overlay: Overlay, extra: str = "") -> None:
        """Mount the directories of an overlay that was unmounted."""
        options = f"lowerdir={self.lower},upperdir={overlay.upper},workdir={overlay.work}"
        self.notices = self.server.client.mount(str(overlay.target), f"{options},{extra}" if extra else options)
        self.overlays.append(overlay)

    def fail(self, what: str = "data") -> None:
        """Let what is dirty meet a failing disk, which is then well again."""
        self.disk.fail(what)
        self.disk.push()
        self.disk.heal()

    def upper_device(self) -> str:
        """The upper's superblock, as overt names it (stat's number is another one on btrfs)."""
        fd = os.open(self.root, os.O_RDONLY)
        try:
            number = superblock(fd)
        finally:
            os.close(fd)
        return f"{os.major(number)}:{os.minor(number)}"

    def host_fd(self) -> int:
        """A descriptor of the upper, as a program on the host opens one."""
        return self.keep(os.open(self.root, os.O_RDONLY | os.O_CLOEXEC))

    def host_syncfs(self) -> int:
        """What the host is told that opens the upper now."""
        fd = os.open(self.root, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return syncfs(fd)
        finally:
            os.close(fd)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The server's events of this kind, since the scene began."""
        return [
            event for event in self.server.client.events() if event["event"] == kind and event["time"] >= self._since
        ]

    def _end(self) -> None:
        for container in self.containers:
            container.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        problems = []
        for overlay in list(self.overlays):
            try:
                overlay.umount()
            except (ServerError, OSError) as problem:
                problems.append(f"{overlay.target}: {problem}")
                with suppress(OSError):
                    mounts.umount(overlay.target, mounts.MNT_DETACH)
        wait_until(lambda: not self._served(), "the server lets go of the mounts")
        assert not problems, problems

    def _served(self) -> bool:
        """Whether the server still serves a mount of this scene."""
        if not self.server.alive:
            return False
        return any(str(self.base) in mount["target"] for mount in self.server.client.status()["mounts"])


def wait_until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}"
        time.sleep(0.01)


@contextmanager
def open_scene(filesystem: str, server: Server, **disk: Any) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(filesystem, server, stack, **disk)
