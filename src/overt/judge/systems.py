"""The systems that are judged: how each mounts an overlay, and how it is unmounted. Nothing else differs between them.

Most are a command line. Some are not, for speed: kernel overlayfs is mounted by fsopen(2), and overt through the socket
of one `overt serve`, as many containers would have it.
"""

import errno
import os
import shutil
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TextIO

from overt.host import mounts, process
from overt.printable import printable
from overt.server import registry
from overt.server.client import Client, ServerError, Started, start

PATIENCE = 30.0  # seconds that a command may take
_VERSION = 5.0  # and to say which it is
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


class Refused(Exception):
    """The system did not mount, and says why."""


class NotApplicable(Exception):
    """This cannot be done to such a system."""


class Layers(NamedTuple):
    """The directories of one overlay."""

    lower: str
    upper: str
    work: str
    over: bool = False
    """whether the lower layer is another overlay of the same system"""

    def options(self) -> list[tuple[str, str | None]]:
        return [("lowerdir", self.lower), ("upperdir", self.upper), ("workdir", self.work)]


class System(ABC):
    """An overlay filesystem and a kind of mount: one column of the matrix."""

    layered = True
    """whether there are lower layers"""
    outlives = False
    """whether its mounts are there when `kill` has killed who serves them"""

    def __init__(self, name: str, kind: str = "ordinary") -> None:
        self.name = name
        self.kind = kind

    def missing(self) -> str | None:
        """Why it cannot be used on this machine, in a few words; None if it can."""
        return None

    def version(self) -> str:
        """Of what is judged, in a line."""
        return f"Linux {os.uname().release}"

    @contextmanager
    def serve(self, place: str) -> Iterator[None]:
        """Start what is needed, for one cell. `place`: a directory for sockets and logs."""
        yield

    @abstractmethod
    def mount(self, layers: Layers, target: str) -> None:
        """Raises Refused."""

    def door(self) -> int:
        """A connection by which a container's process comes under the system's care (judge/guarded.py); -1: it is not.

        A descriptor, the caller's to close. OSError.
        """
        return -1

    def admit(self, layers: Layers) -> None:
        """Wait until it has. Raises Refused."""
        return

    def umount(self, target: str) -> str:
        """Unmount as its users do; what they are told: 0, an errno's name, or EIO for a record of lost data."""
        mounts.umount(target)
        return "0"

    def kill(self) -> None:
        """Kill the processes that serve the mounts. Raises NotApplicable if there are none."""
        raise NotApplicable("no process serves it")


class Plain(System):
    """The filesystem itself: a container's root is a directory of it, with a copy of the lower layer's files."""

    layered = False

    def mount(self, layers: Layers, target: str) -> None:
        clone = mounts.clone(layers.upper)
        try:
            mounts.attach(clone, target)
        finally:
            os.close(clone)


class Kernel(System):
    """The kernel's overlayfs."""

    def __init__(self, name: str, kind: str = "ordinary", *options: tuple[str, str | None]) -> None:
        super().__init__(name, kind)
        self._options = options

    def missing(self) -> str | None:
        return None if mounts.is_known("overlay") else "not in this kernel"

    def mount(self, layers: Layers, target: str) -> None:
        try:
            mount = mounts.new_mount("overlay", [*layers.options(), *self._options])
        except OSError as error:
            raise Refused(error.strerror) from None
        try:
            mounts.attach(mount, target)
        finally:
            os.close(mount)


class Command(System):
    """Whatever a command line mounts: words in which {lower}, {upper}, {work} and {mount} are filled in.

    The command may stay in the foreground or not; it is waited for until the mount is there.
    """

    def __init__(self, name: str, kind: str, words: list[str]) -> None:
        super().__init__(name, kind)
        self.words = words
        self._servers: list[int] = []

    def missing(self) -> str | None:
        if shutil.which(self.words[0], path=_PATH) is None:
            return f"{os.path.basename(self.words[0])} is not installed"
        return None

    def version(self) -> str:
        try:
            done = subprocess.run(
                [self.words[0], "--version"], capture_output=True, text=True, errors="replace",
                stdin=subprocess.DEVNULL, env={**os.environ, "PATH": _PATH}, timeout=_VERSION,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return "version unknown"
        lines = [line for line in (done.stdout + done.stderr).splitlines() if any(map(str.isdigit, line))]
        own = [line for line in lines if self.words[0] in line]
        return (own or lines or ["version unknown"])[0].strip()

    @contextmanager
    def serve(self, place: str) -> Iterator[None]:
        self._place = place
        self._servers = []
        yield

    def mount(self, layers: Layers, target: str) -> None:
        words = [word.format(**layers._asdict(), mount=target) for word in self.words]
        before = os.stat(target).st_dev
        known = set(process.children())
        with open(f"{self._place}/log", "w+", encoding="utf-8", errors="replace") as log:
            server = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "PATH": _PATH}
            )
            deadline = time.monotonic() + PATIENCE
            while os.stat(target).st_dev == before:
                if server.poll():
                    raise Refused(_said(log) or f"exit status {server.returncode}")
                if time.monotonic() > deadline:
                    server.kill()
                    server.wait()
                    raise Refused(f"did not mount in {PATIENCE:g} s: {_said(log)}".removesuffix(": "))
                time.sleep(0.001)
        with suppress(subprocess.TimeoutExpired):  # it may go into the background, or stay
            server.wait(0.05)
        self._servers += [pid for pid in process.children() if pid not in known]

    def kill(self) -> None:
        if not self._servers:
            raise NotApplicable("no process serves it")
        while self._servers:
            os.kill(self._servers.pop(), signal.SIGKILL)


def _said(log: TextIO) -> str:
    """The end of what was written into a log, on one line."""
    log.seek(0)
    return " ".join(log.read().split())[-200:]


class Given(Command):
    """What a user names. It is run to mount, in a cell, and never asked for its version: it may take no options."""

    def version(self) -> str:
        return printable(" ".join(self.words))


class Overt(System):
    """One `overt serve` for all mounts of a cell."""

    def __init__(self, name: str, kind: str = "ordinary", options: str = "") -> None:
        super().__init__(name, kind)
        self._options = options

    def missing(self) -> str | None:
        return process.no_fuse()

    def version(self) -> str:
        from overt import __version__

        return f"overt {__version__}"

    @contextmanager
    def serve(self, place: str) -> Iterator[None]:
        self._place = place
        self._servers: list[Started] = []
        # Servers tidy up after each other, by what is in this directory. None of the user's is to be touched.
        apart = mounts.new_mount("tmpfs", [("mode", "700")])
        mounts.attach(apart, str(registry.directory()))
        os.close(apart)
        self._start()
        try:
            yield
        finally:
            self.kill()

    def _start(self) -> Started:
        log = Path(self._place, "log")
        try:
            server = start(f"{self._place}/socket{len(self._servers)}", log=str(log))
        except OSError as error:
            said = log.read_text("utf-8", "replace").strip()[-200:]
            raise Refused(f"{error}: {said}") from None
        self._servers.append(server)
        return server

    def mount(self, layers: Layers, target: str) -> None:
        """By the server of this cell; by another if that was killed, or serves the layer below."""
        words = ",".join(f"{key}={value}" for key, value in layers.options())
        server = self._servers[-1]
        if layers.over or server.process.poll() is not None:
            server = self._start()
        try:
            with Client(server.path) as client:
                client.mount(target, f"{words},{self._options}" if self._options else words)
        except ServerError as error:
            raise Refused(str(error)) from None

    def umount(self, target: str) -> str:
        """By `overt umount`, whose exit status and record say whether anything was lost."""
        try:
            with Client(self._servers[-1].path) as client:
                record = client.umount(target)
        except ServerError as error:
            raise OSError(errno.EIO, str(error)) from None
        return "0" if record["verdict"] in ("no error recorded", "gone") else "EIO"

    def kill(self) -> None:
        """Its mounts are gone, or shall be: it need not be asked to end."""
        for server in self._servers:
            if server.process.poll() is None:
                server.process.kill()
                server.process.wait()


def from_command(line: str, kind: str) -> System:
    """A system that a user names: `CMD -o lowerdir={lower},upperdir={upper},workdir={work} {mount}`. ValueError."""
    import shlex

    words = shlex.split(line)
    if not any("{mount}" in word for word in words):
        raise ValueError("it does not say {mount}, where to mount")
    for word in words:
        try:
            word.format(lower="", upper="", work="", mount="")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            known = "{lower}, {upper}, {work} and {mount}"
            raise ValueError(f"{word!r} cannot be filled in: {error} (there are {known}; {{{{ for a brace)") from None
    name = printable(os.path.basename(words[0]))
    return Given(f"{name}{' volatile' * (kind == 'volatile')} (given)", kind, words)
