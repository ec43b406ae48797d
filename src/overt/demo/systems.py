"""The overlay filesystems that the demo compares: how each is mounted, and which processes serve it.

Whatever mounts it, an overlay is handed over as a detached mount (see overt.demo.containers).
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from overt.host import mounts, process
from overt.host.process import in_user_namespace
from overt.server.client import Client, ServerError, Started, start

_PATIENCE = 60.0
"""seconds for a guard to start, and to take its containers"""


class Layers(NamedTuple):
    """The directories of one overlay."""

    lower: str
    upper: str
    work: str


class Service(ABC):
    """A system at work."""

    @abstractmethod
    def mount(self, layers: Layers) -> int:
        """Mount one more overlay; its descriptor."""

    @abstractmethod
    def pids(self) -> list[int]:
        """The processes that serve what was mounted."""

    def blind(self) -> str | None:
        """Why questions would show nothing here, in a few words, once something is mounted; None if they do."""
        return None

    guard: str | None = None
    """the socket of the guard to which the containers hand their syncfs(2) over, if there is one"""

    def await_containers(self, count: int) -> None:
        """Return when all is ready for what containers do. OSError if it does not get so."""
        return


class System(ABC):
    """One row of the table: an overlay filesystem, and the kind of mount."""

    name: str

    def __init__(self, volatile: bool) -> None:
        self.volatile = volatile

    @property
    def kind(self) -> str:
        return "volatile" if self.volatile else "ordinary"

    @abstractmethod
    def missing(self) -> str | None:
        """Why it cannot be used on this machine, in a few words; None if it can."""

    @abstractmethod
    def serve(self) -> AbstractContextManager[Service]:
        """Start what is needed. At the end the mounts are gone already."""

    def options(self, layers: Layers) -> list[tuple[str, str | None]]:
        named: list[tuple[str, str | None]] = [
            ("lowerdir", layers.lower),
            ("upperdir", layers.upper),
            ("workdir", layers.work),
        ]
        return [*named, ("volatile", None)] if self.volatile else named

    def option_string(self, layers: Layers) -> str:
        return ",".join(key if value is None else f"{key}={value}" for key, value in self.options(layers))


class KernelOverlayfs(System, Service):
    name = "kernel overlayfs"

    def missing(self) -> str | None:
        return None if mounts.is_known("overlay") else "not in this kernel"

    @contextmanager
    def serve(self) -> Iterator[Service]:
        yield self

    def mount(self, layers: Layers) -> int:
        return mounts.new_mount("overlay", self.options(layers))

    def options(self, layers: Layers) -> list[tuple[str, str | None]]:
        named = super().options(layers)
        return [*named, ("userxattr", None)] if in_user_namespace() else named

    def pids(self) -> list[int]:
        return []


class FuseOverlayfs(System, Service):
    """A process for each overlay, as podman runs it."""

    name = "fuse-overlayfs"

    def missing(self) -> str | None:
        return process.no_fuse() if shutil.which(self.name) else "not installed"

    @contextmanager
    def serve(self) -> Iterator[Service]:
        # It puts itself into the background, but is to stay a child of ours: to be found, and to be buried.
        process.adopt_orphans()
        with tempfile.TemporaryDirectory(prefix="overt-demo-") as self._place:
            try:
                yield self
            finally:
                for pid in self.pids():
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                with suppress(OSError):  # it is in its place only if the demo was stopped while it was being made
                    mounts.umount(self._place, mounts.MNT_DETACH)

    def mount(self, layers: Layers) -> int:
        command = [self.name, "-o", self.option_string(layers), self._place]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            words = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
            raise OSError(errno.EIO, f"{self.name}: {words}")
        try:
            return mounts.clone(self._place)
        finally:
            mounts.umount(self._place)

    def pids(self) -> list[int]:
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    stat = Path(f"/proc/{entry}/stat").read_text()
                except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                    continue
                name, _, rest = stat.partition("(")[2].rpartition(")")
                if name == self.name and int(rest.split()[1]) == os.getpid():
                    found.append(int(entry))
        return found


class Overt(System):
    """One process, and its watchdog, for all overlays."""

    name = "overt"

    def missing(self) -> str | None:
        return process.no_fuse()

    @contextmanager
    def serve(self) -> Iterator[Service]:
        with tempfile.TemporaryDirectory(prefix="overt-demo-") as place:
            log = Path(place, "log")
            try:
                server = start(f"{place}/socket", log=str(log))
            except OSError as error:
                raise OSError(errno.EIO, f"{error}: {log.read_text().strip()}") from None
            try:
                with Client(server.path) as client:
                    yield OvertService(self, server, client)
            finally:
                status = server.stop()
            if status:
                raise OSError(errno.EIO, f"overt serve ended with status {status}: {log.read_text().strip()}")


class OvertService(Service):
    def __init__(self, system: System, server: Started, client: Client) -> None:
        self._system = system
        self._server = server
        self._client = client

    def mount(self, layers: Layers) -> int:
        try:
            return self._client.mount_detached(self._system.option_string(layers))
        except ServerError as error:
            raise OSError(errno.EIO, str(error)) from None

    def blind(self) -> str | None:
        told = all(mount["syncfs"] for mount in self._client.status()["mounts"])
        return None if told else "this kernel does not send syncfs to FUSE (before Linux 6.18)"

    def pids(self) -> list[int]:
        return self._server.pids()


class Guarded(KernelOverlayfs):
    """Kernel overlayfs, and `overt guard` beside it; only ordinary mounts need it."""

    name = "overt guard"

    def missing(self) -> str | None:
        return "not without root" if in_user_namespace() else super().missing()

    @contextmanager
    def serve(self) -> Iterator[Service]:
        with tempfile.TemporaryDirectory(prefix="overt-demo-") as place:
            self.guard = f"{place}/socket"
            log = Path(place, "log")
            command = [sys.executable, "-m", "overt", "guard", "run", "-f", "--socket", self.guard]
            with (
                open(log, "wb") as output,
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as self._process,
            ):
                try:
                    self._await(lambda: Path(f"{self.guard}.status").exists(), log)
                    yield self
                finally:
                    self._process.terminate()

    def await_containers(self, count: int) -> None:
        self._await(lambda: self._guarded() == count)

    def _guarded(self) -> int:
        from overt.guard import supervisor  # here, to keep the containers, which are forks of this process, small

        overlays: Any = supervisor.ask(Path(self.guard or ""))["overlays"]
        return sum(each["guarded"] for each in overlays)

    def _await(self, condition: Callable[[], bool], log: Path | None = None) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, f"no guard: {log.read_text().strip() if log else 'it is too slow'}")
            time.sleep(0.05)

    def pids(self) -> list[int]:
        return [self._process.pid, *process.children(self._process.pid)]


SYSTEMS = (KernelOverlayfs, FuseOverlayfs, Overt)


def all_systems() -> list[System]:
    """Every system, ordinary and volatile, in the order of the table; the guard last."""
    return [*(system(volatile) for system in SYSTEMS for volatile in (False, True)), Guarded(False)]
