"""The systems that are compared: how each is started, mounts a stack of layers, and ends.

A system is started anew for every sample, so that its processor time and memory are those of that sample, and no system
runs while another is measured.
"""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import ClassVar, NamedTuple

from overt.bench import tools
from overt.host import mounts
from overt.server.client import Client, ServerError, Started, start

READY = 30.0  # seconds that a server may take to bring up a mount, or to go away


class Layers(NamedTuple):
    """Where the parts of an overlay are, lowers topmost first."""

    lower: tuple[Path, ...]
    upper: Path
    work: Path
    flat: Path
    """The same tree without an overlay, for the plain filesystem."""

    def options(self) -> str:
        """As mount(8) takes them."""
        return f"lowerdir={':'.join(map(str, self.lower))},upperdir={self.upper},workdir={self.work}"


class System:
    """One starts it, mounts with it any number of times, and stops it."""

    name: ClassVar[str]
    command: ClassVar[str | None] = None
    """The program that has to be installed."""
    serves: ClassVar[bool] = False
    """Whether it has processes of its own."""

    def __init__(self, scratch: Path) -> None:
        """`scratch` is a directory for sockets and logs."""
        self.scratch = scratch

    def start(self) -> None:
        """Get ready to mount. Raises OSError."""

    def pids(self) -> list[int]:
        """The processes that serve the mounts."""
        return []

    def mount(self, layers: Layers, target: Path) -> None:
        """Mount an overlay; return when it can be used. Raises OSError."""
        raise NotImplementedError

    def umount(self, target: Path) -> None:
        """Unmount; return when the server has let go. Raises OSError."""
        mounts.umount(str(target))

    def stop(self) -> None:
        """End what still runs."""


class Plain(System):
    """The filesystem itself, bound to the same place."""

    name = "plain"

    def mount(self, layers: Layers, target: Path) -> None:
        clone = mounts.clone(str(layers.flat))
        try:
            mounts.attach(clone, str(target))
        finally:
            os.close(clone)


class Kernel(System):
    """The kernel's overlayfs, with the options that the running kernel has as its defaults."""

    name = "kernel"

    def mount(self, layers: Layers, target: Path) -> None:
        lower = ":".join(map(str, layers.lower))
        mount = mounts.new_mount(
            "overlay", [("lowerdir", lower), ("upperdir", str(layers.upper)), ("workdir", str(layers.work))]
        )
        try:
            mounts.attach(mount, str(target))
        finally:
            os.close(mount)


class FuseOverlayfs(System):
    """fuse-overlayfs: a process to each mount, here in the foreground so that its number is known."""

    name = "fuse-overlayfs"
    command = "fuse-overlayfs"
    serves = True

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.servers: dict[Path, subprocess.Popen[bytes]] = {}

    def pids(self) -> list[int]:
        return [server.pid for server in self.servers.values()]

    def mount(self, layers: Layers, target: Path) -> None:
        before = target.stat().st_dev
        log = self.scratch / "fuse-overlayfs.log"
        with log.open("wb") as stderr:
            # A session of its own: Ctrl-C is for the bench, which then unmounts.
            server = subprocess.Popen(
                ["fuse-overlayfs", "-f", "-o", layers.options(), str(target)],
                env=tools.ENVIRONMENT, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
            )  # fmt: skip
        self.servers[target] = server
        deadline = time.monotonic() + READY
        while target.stat().st_dev == before:
            if server.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"fuse-overlayfs did not mount {target}: {_last_line(log)}")
            time.sleep(0.0002)

    def umount(self, target: Path) -> None:
        super().umount(target)
        self.servers.pop(target).wait(READY)

    def stop(self) -> None:
        for server in self.servers.values():
            server.kill()
            server.wait(READY)


class Overt(System):
    """One `overt serve` for all mounts."""

    name = "overt"
    serves = True

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.started: Started | None = None
        self.client: Client | None = None

    def start(self) -> None:
        socket, log = str(self.scratch / "overt.sock"), self.scratch / "overt.log"
        log.unlink(missing_ok=True)
        try:
            self.started = start(socket, log=str(log))
        except OSError as error:
            raise OSError(f"overt serve did not start: {_last_line(log) or error}") from error
        self.client = Client(socket)

    def pids(self) -> list[int]:
        return self.started.pids() if self.started else []

    def mount(self, layers: Layers, target: Path) -> None:
        assert self.client
        try:
            self.client.mount(str(target), layers.options())
        except ServerError as error:
            raise OSError(str(error)) from error

    def umount(self, target: Path) -> None:
        assert self.client
        try:
            self.client.umount(str(target))
        except ServerError as error:
            raise OSError(str(error)) from error

    def stop(self) -> None:
        if self.client:
            self.client.close()
        if self.started and self.started.stop(READY):
            raise OSError(f"overt serve did not end well: {_last_line(self.scratch / 'overt.log')}")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "")


SYSTEMS: dict[str, type[System]] = {system.name: system for system in (Plain, Kernel, FuseOverlayfs, Overt)}


def kill(system: System) -> None:
    """End the processes of `system` at once: requests that wait for them fail with ENOTCONN."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # they have ended by themselves
        for pid in system.pids():
            os.kill(pid, signal.SIGKILL)
