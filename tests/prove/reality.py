"""The verbs of the model, done to a real disk: ext4 that fails on demand, and overlays of the kernel's or overt's.

One disk serves many histories. What the last one left on the upper's cursor is looked at, by the host, before the
next: a cursor whose value was seen is as good as a new one.
"""

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from overt.host import files, mounts
from overt.lab import Disk
from overt.server.client import Client, ServerError, start

PAGE = 4096
EIO = 5


def told(call, *args) -> int:
    """The errno that a call raises, or 0."""
    try:
        call(*args)
    except OSError as error:
        return error.errno or -1
    return 0


class System(ABC):
    """Who mounts overlays."""

    @abstractmethod
    def mount(self, options: str, target: str) -> int:
        """Mount; the errno with which it is refused, or 0."""

    @abstractmethod
    def umount(self, target: str) -> int:
        """Unmount; EIO if whoever does so is told of an error."""


class Kernel(System):
    def mount(self, options: str, target: str) -> int:
        pairs = [(key, value or None) for key, _, value in (word.partition("=") for word in options.split(","))]
        try:
            fd = mounts.new_mount("overlay", pairs)
        except OSError as error:
            return error.errno or -1
        try:
            mounts.attach(fd, target)
        finally:
            os.close(fd)
        return 0

    def umount(self, target: str) -> int:
        mounts.umount(target)
        return 0


class Overt(System):
    def __init__(self, client: Client) -> None:
        self.client = client

    def mount(self, options: str, target: str) -> int:
        try:
            self.client.mount(target, options)
        except ServerError:
            return EIO
        return 0

    def umount(self, target: str) -> int:
        return 0 if self.client.umount(target)["verdict"] == "no error recorded" else EIO


class Stage:
    """A disk, and who mounts on it."""

    def __init__(self, disk: Disk, system: System, base: Path) -> None:
        self.disk, self.system, self.base = disk, system, base
        self.root = Path(disk.path)
        self.page = disk.marker * (PAGE // len(disk.marker))
        self.count = 0
        self.lower = base / "lower"
        self.lower.mkdir()
        (self.lower / "file").write_bytes(b"lower")

    def lose(self) -> None:
        """What is dirty meets a disk that refuses marked pages."""
        self.disk.fail("data")
        self.disk.push()
        self.disk.heal()

    def host_syncfs(self) -> int:
        fd = os.open(self.root, os.O_RDONLY)
        try:
            return told(files.syncfs, fd)
        finally:
            os.close(fd)

    @contextmanager
    def world(self, kinds: tuple[bool, ...]) -> Iterator["World"]:
        """A world as the model's is in the beginning."""
        self.host_syncfs()
        world = World(self, kinds)
        try:
            yield world
        finally:
            world.close()


class World:
    """Overlays and a host, who do what the model's do."""

    def __init__(self, stage: Stage, kinds: tuple[bool, ...]) -> None:
        self.stage, self.kinds = stage, kinds
        self.host = len(kinds)
        self.fds: dict[tuple[int, int], int] = {}
        self.targets: dict[int, Path] = {}
        self.uppers: dict[int, Path] = {}
        self._made: list[Path] = []

    def do(self, party: int, verb: str, fd: int) -> int:
        """Do a verb; what was answered. `fd` is the number by which the history knows an open file."""
        return int(getattr(self, "close_file" if verb == "close" else verb)(party, fd) or 0)

    def mount(self, party: int, _: int) -> int:
        stage = self.stage
        stage.count += 1
        upper, work = stage.root / f"upper-{stage.count}", stage.root / f"work-{stage.count}"
        target = stage.base / f"mnt-{stage.count}"
        for path in (upper, work, target):
            path.mkdir()
            self._made.append(path)
        options = f"lowerdir={stage.lower},upperdir={upper},workdir={work}"
        code = stage.system.mount(options + ",volatile" * self.kinds[party], str(target))
        if code == 0:
            self.targets[party], self.uppers[party] = target, upper
        return code

    def umount(self, party: int, _: int) -> int:
        return self.stage.system.umount(str(self.targets.pop(party)))

    def open(self, party: int, fd: int) -> None:
        path = self.stage.root if party == self.host else self.targets[party] / "file"
        self.fds[party, fd] = os.open(path, os.O_RDONLY)

    def open_write(self, party: int, fd: int) -> None:
        self.fds[party, fd] = os.open(self.targets[party] / "file", os.O_RDWR)

    def close_file(self, party: int, fd: int) -> None:
        os.close(self.fds.pop((party, fd)))

    def write(self, party: int, fd: int) -> None:
        os.pwrite(self.fds[party, fd], self.stage.page, 0)

    def write_back(self, party: int, _: int) -> None:
        self.stage.disk.push()

    def lose(self, party: int, _: int) -> None:
        if party == self.host:
            fd = os.open(self.stage.root / "host-file", os.O_RDWR | os.O_CREAT)
            os.pwrite(fd, self.stage.page, 0)
            os.close(fd)
        self.stage.lose()

    def syncfs(self, party: int, fd: int) -> int:
        return told(files.syncfs, self.fds[party, fd])

    def fsync(self, party: int, fd: int) -> int:
        return told(os.fsync, self.fds[party, fd])

    def evict(self, party: int, _: int) -> None:
        """An inode with pages stays; without, it goes with its dentries, the overlay's first and then the upper's."""
        fd = os.open(self.uppers[party] / "file", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        for _ in range(4):
            Path("/proc/sys/vm/drop_caches").write_text("2")

    def abort(self, party: int, _: int) -> None:
        """The journal cannot be written. Nothing on this disk can be removed afterwards."""
        self.stage.disk.fail("write")
        os.mkdir(self.stage.root / "journalled")
        with suppress(OSError):
            self.stage.disk.push()
        self._made.clear()

    def in_call(self, party: int, verb: str, fd: int) -> int:
        """The question itself finds the disk failing."""
        self.stage.disk.fail("data")
        try:
            return self.do(party, verb, fd)
        finally:
            self.stage.disk.heal()

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)
        for target in self.targets.values():
            with suppress(ServerError):
                self.stage.system.umount(str(target))
        for path in self._made:
            shutil.rmtree(path)


@contextmanager
def kernel_stage() -> Iterator[Stage]:
    """The kernel's overlayfs on a failing disk."""
    with Disk("ext4", size=64 << 20) as disk, tempfile.TemporaryDirectory(prefix="overt-prove-") as base:
        yield Stage(disk, Kernel(), Path(base))


@contextmanager
def overt_stage() -> Iterator[Stage]:
    """`overt serve` with mounts on a failing disk."""
    with Disk("ext4", size=64 << 20) as disk, tempfile.TemporaryDirectory(prefix="overt-prove-") as base:
        server = start(f"{base}/socket", log=f"{base}/log")
        try:
            with Client(server.path) as client:
                yield Stage(disk, Overt(client), Path(base))
                crashes = client.status()["events"].get("internal error")
                assert not crashes, Path(base, "log").read_text()[-4000:]
        finally:
            status = server.stop()
        assert status == 0, Path(base, "log").read_text()[-4000:]
