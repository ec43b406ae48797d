"""The verbs of the model, done to a real disk: ext4 that fails on demand, and overlays of the kernel's or overt's.

One disk serves many histories. What the last one left on the upper's cursor is looked at, by the host, before the
next: a cursor whose value was seen is as good as a new one.

Nothing that is done here reaches beyond the disk. Inodes are evicted by way of a memory control group, in which those
are who have caused them to be there.
"""

import errno
import mmap
import os
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from overt.host import files, mounts
from overt.host.libc import check, libc
from overt.lab import Disk
from overt.server.client import Client, ServerError, Started, start

PAGE = 4096
EIO, ENOSPC = errno.EIO, errno.ENOSPC
_MS_RDONLY, _MS_REMOUNT = 1, 32


def told(call, *args) -> int:
    """The errno that a call raises, or 0."""
    try:
        call(*args)
    except OSError as error:
        return error.errno or -1
    return 0


def _superblock_is_read_only(target: Path) -> bool:
    (line,) = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {target} " in line]
    return line.rpartition(" ")[2].split(",")[0] == "ro"


class Group:
    """A memory control group of this process and those that it starts: what they have caused can be reclaimed."""

    def __init__(self) -> None:
        """OSError where there is no memory controller, or it is not ours to use."""
        first = Path("/sys/fs/cgroup/memory")
        self._root = first if first.is_dir() else first.parent
        self._reclaim = "memory.force_empty" if first.is_dir() else "memory.reclaim"
        ours = {
            controllers: path.lstrip("/")
            for _, controllers, path in (line.split(":") for line in Path("/proc/self/cgroup").read_text().splitlines())
        }
        self._home = self._root / ours["memory" if first.is_dir() else ""]
        self._own = self._root / f"overt-prove-{os.getpid()}"
        self._own.mkdir()
        try:
            if not (self._own / self._reclaim).exists():
                raise FileNotFoundError(errno.ENOENT, "no such file", str(self._own / self._reclaim))
            (self._own / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            self._own.rmdir()
            raise

    def reclaim(self) -> None:
        """Have the kernel give back what it can: dentries first, then their inodes, then those of the layer below."""
        for _ in range(4):
            with suppress(BlockingIOError):  # there was not as much
                (self._own / self._reclaim).write_text("1G")
            time.sleep(0.01)  # a server forgets meanwhile

    def close(self) -> None:
        for pid in (self._own / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                (self._home / "cgroup.procs").write_text(pid)
        self._own.rmdir()


class System(ABC):
    """Who mounts overlays."""

    @abstractmethod
    def mount(self, options: str, target: str) -> int:
        """Mount; the errno with which it is refused, or 0."""

    @abstractmethod
    def umount(self, target: str) -> int:
        """Unmount; EIO if whoever does so is told of an error."""

    def die(self, targets: list[str]) -> None:
        """Kill whoever serves the mounts at `targets`, and start anew: nothing is mounted then."""
        raise NotImplementedError


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
    """A server, and another one when that was killed."""

    def __init__(self, base: str) -> None:
        self.base, self.number = base, 0
        self.start()

    def start(self) -> None:
        self.number += 1
        self.server: Started = start(f"{self.base}/socket-{self.number}", log=f"{self.base}/log")
        self.client = Client(self.server.path)

    def log(self) -> str:
        return Path(self.base, "log").read_text()[-4000:]

    def stop(self) -> None:
        with self.client:
            crashes = self.client.status()["events"].get("internal error")
        assert self.server.stop() == 0, self.log()
        assert not crashes, self.log()

    def die(self, targets: list[str]) -> None:
        self.client.close()
        self.server.process.kill()
        self.server.process.wait(10)
        for target in targets:
            assert told(os.statvfs, target) == errno.ENOTCONN
        self.start()  # which clears dead mounts away
        assert not any(map(os.path.ismount, targets))

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
        (self.lower / "file").write_bytes(self.page)
        self.group: Group | None = None

    def lose(self, code: int = EIO) -> None:
        """What is dirty meets a disk that refuses marked pages."""
        self.disk.fail("data", errno=code)
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
        self.read_only: set[int] = set()
        """of which the superblock was remounted so"""
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
        self.read_only.discard(party)
        return self.stage.system.umount(str(self.targets.pop(party)))

    def open(self, party: int, fd: int) -> None:
        path = self.stage.root if party == self.host else self.targets[party] / "file"
        self.fds[party, fd] = os.open(path, os.O_RDONLY)

    def open_write(self, party: int, fd: int) -> None:
        copied = not (self.uppers[party] / "file").exists()
        self.fds[party, fd] = os.open(self.targets[party] / "file", os.O_RDWR)
        if copied and self.kinds[party]:
            self.stage.disk.push()  # the copy, which a volatile mount does not flush

    def copy_fails(self, party: int, fd: int) -> int:
        path = self.targets[party] / "file"
        self.stage.disk.fail("data")
        try:
            self.fds[party, fd] = os.open(path, os.O_RDWR)
            self.stage.disk.push()
        except OSError as error:
            assert path.read_bytes() == self.stage.page
            assert not (self.uppers[party] / "file").exists()
            return error.errno or -1
        finally:
            self.stage.disk.heal()
        return 0

    def remount_ro(self, party: int, _: int) -> int:
        self.read_only.add(party)
        return self._remount(party, _MS_RDONLY)

    def remount_rw(self, party: int, _: int) -> int:
        """When what the remount to read-only had to do is over."""
        deadline = time.monotonic() + 10
        while not _superblock_is_read_only(self.targets[party]):
            assert time.monotonic() < deadline
        self.read_only.discard(party)
        return self._remount(party, 0)

    def _remount(self, party: int, flags: int) -> int:
        target = os.fsencode(self.targets[party])
        return told(lambda: check(libc.mount(None, target, None, _MS_REMOUNT | flags, None), target))

    def close_file(self, party: int, fd: int) -> None:
        os.close(self.fds.pop((party, fd)))

    def write(self, party: int, fd: int) -> None:
        os.pwrite(self.fds[party, fd], self.stage.page, 0)

    def write_back(self, party: int, _: int) -> None:
        self.stage.disk.push()

    def write_sync(self, party: int, fd: int) -> int:
        return told(os.pwritev, self.fds[party, fd], [self.stage.page], 0, os.RWF_SYNC)

    def lose_space(self, party: int, _: int) -> None:
        self.lose(party, _, ENOSPC)

    def lose(self, party: int, _: int, code: int = EIO) -> None:
        if party == self.host:
            fd = os.open(self.stage.root / "host-file", os.O_RDWR | os.O_CREAT)
            os.pwrite(fd, self.stage.page, 0)
            os.close(fd)
        self.stage.lose(code)

    def syncfs(self, party: int, fd: int) -> int:
        return told(files.syncfs, self.fds[party, fd])

    def fsync(self, party: int, fd: int) -> int:
        return told(os.fsync, self.fds[party, fd])

    def msync(self, party: int, fd: int) -> int:
        with mmap.mmap(self.fds[party, fd], PAGE) as mapping:
            return told(mapping.flush)

    def fsync_dir(self, party: int, _: int) -> int:
        fd = os.open(self.targets[party], os.O_RDONLY | os.O_DIRECTORY)
        try:
            return told(os.fsync, fd)
        finally:
            os.close(fd)

    def evict(self, party: int, _: int) -> None:
        """An inode with pages stays; without, it goes with its dentries, the overlay's first and then the upper's."""
        assert self.stage.group is not None
        fd = os.open(self.uppers[party] / "file", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        self.stage.group.reclaim()

    def die(self) -> None:
        """The server of all mounts is killed. Whoever still has a file open is told that nobody answers.

        But by syncfs(2) on a read-only superblock, which does not ask.
        """
        targets, self.targets = self.targets, {}
        self.stage.system.die([str(target) for target in targets.values()])
        for party, fd in [key for key in self.fds if key[0] != self.host]:
            assert self.fsync(party, fd) == errno.ENOTCONN
            assert party in self.read_only or self.syncfs(party, fd) == errno.ENOTCONN
            self.close_file(party, fd)
        self.read_only.clear()

    def abort(self, party: int, _: int) -> None:
        """The journal cannot be written. Nothing on this disk can be removed afterwards."""
        self.stage.disk.fail("write")
        os.mkdir(self.stage.root / "journalled")
        with suppress(OSError):
            self.stage.disk.push()
        self._made.clear()

    def in_call(self, party: int, verb: str, fd: int, code: int = EIO) -> int:
        """The question itself finds the disk failing."""
        self.stage.disk.fail("data", errno=code)
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
        overt = Overt(base)
        try:
            yield Stage(disk, overt, Path(base))
        finally:
            overt.stop()
