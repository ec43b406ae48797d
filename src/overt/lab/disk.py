"""A disk that fails on demand, with a filesystem on it, mounted.

    with Disk("ext4") as disk:
        fd = os.open(f"{disk.path}/file", os.O_RDWR | os.O_CREAT)
        os.write(fd, disk.marker * 4096)
        disk.fail("data")
        disk.push()             # the kernel writes the file's pages back, the disk refuses them
        os.fsync(fd)            # OSError: EIO

Telling data from metadata. A disk sees blocks, not files. So data is what carries the marker: `disk.marker`, 16 random
bytes made for this disk (or bytes of the caller's choice). A write that contains it is a data write and fails under
fail("data"); journal, inodes, directories, and other files' data do not contain it and succeed. Put one marker into
every block that should fail. What would defeat this: file names and extended attributes with the marker in them,
data=journal, compression, encryption.

Failure is armed before the pages are dirty or after, but before they are written back: the kernel may do that at any
time on its own (after 30 s, by default), `push()` makes it happen now.

What is behind it: an image in memory, a FUSE server (overt.lab.server), a loop device with direct I/O, and a process
that cleans up (overt.lab.keeper). A disk ends with close(), or with the process that made it, however that ends. While
a disk hangs, a sync(2) anywhere on the machine waits for it.
"""

import mmap
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from errno import EIO
from pathlib import Path
from types import TracebackType
from typing import Self

import overt
from overt.host import mounts
from overt.lab import image
from overt.lab.channel import Channel
from overt.lab.filesystems import FILESYSTEMS, program
from overt.lab.place import Place
from overt.lab.recording import Recording

# Isolated and without site: the keeper needs nothing but the standard library and this package, and starts sooner.
_KEEPER = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from overt.lab import keeper; keeper.main(*(int(word) for word in sys.argv[2:]))"
)
_ATTRIBUTES = {
    "nosuid": mounts.MOUNT_ATTR_NOSUID,
    "nodev": mounts.MOUNT_ATTR_NODEV,
    "noexec": mounts.MOUNT_ATTR_NOEXEC,
    "noatime": mounts.MOUNT_ATTR_NOATIME,
}
_SET_UP = 90.0  # seconds; more than the keeper's own deadlines together
_TEAR_DOWN = 30.0


class Snapshot(mmap.mmap):
    """Contents of a disk: bytes-like, to be read only. `marker in snapshot` and `snapshot.find(marker)` search it."""

    def __contains__(self, wanted: object) -> bool:  # mmap's own would compare single bytes
        return isinstance(wanted, bytes) and self.find(wanted) >= 0


class Disk:
    """See above. Needs root, /dev/fuse, loop devices, and the filesystem's mkfs.

    filesystem: a row of FILESYSTEMS: "ext4", "ext4-nojournal", "xfs", "btrfs".
    size: bytes (memory is used for what is written only); raised to what the filesystem or the image needs.
    directory: where to mount it; a new directory, removed at the end, if None.
    mkfs_options: further arguments for mkfs.
    mount_options: as for mount -o ("data=journal,noatime").
    image: a file (of snapshot()) with a filesystem to mount, in place of making one: what a power cut leaves.

    Raises ValueError (no such filesystem), FileNotFoundError (mkfs is not installed: names the package), OSError.
    Its methods are for the process that made it, any thread.
    """

    def __init__(
        self,
        filesystem: str = "ext4",
        size: int = 256 << 20,
        directory: str | os.PathLike[str] | None = None,
        mkfs_options: Sequence[str] = (),
        mount_options: str = "",
        image: str | os.PathLike[str] | None = None,
    ) -> None:
        if filesystem not in FILESYSTEMS:
            raise ValueError(f"no filesystem {filesystem!r} in the lab: there are {', '.join(FILESYSTEMS)}")
        row = FILESYSTEMS[filesystem]
        make = [program(row.make[0], row.package), *row.make[1:], *mkfs_options]
        options, attributes = _options(row.mount_options, mount_options)
        self.filesystem = filesystem
        least = row.least if image is None else os.stat(image).st_size
        self.size = -(-max(size, least) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.marker = os.urandom(16)
        self._owner = os.getpid()
        self._open = True
        with ExitStack() as sent:
            control, keeper_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            serving, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for theirs in (keeper_end, server_end):
                sent.enter_context(theirs)
            self._control, self._serving = Channel(control), Channel(serving)
            us = os.pidfd_open(self._owner)
            sent.callback(os.close, us)
            fds = (keeper_end.fileno(), server_end.fileno(), us)
            self._keeper = _start_keeper(fds, self._owner)
        try:
            with ExitStack() as sent:
                contents = []
                if image is not None:
                    contents.append(sent.enter_context(open(image, "rb")).fileno())
                made = self._control.ask(
                    "make",
                    patience=_SET_UP,
                    fds=contents,
                    kind=row.kind,
                    size=self.size,
                    make=make,
                    options=options,
                    attributes=attributes,
                    mount_at="" if directory is None else os.path.realpath(directory),
                    scratch=tempfile.gettempdir(),
                )
        except BaseException:
            self._let_go()
            raise
        self.path: str = made["path"]
        self.device: str = made["device"]
        self.server_pid: int = made["server"]
        self.keeper_pid = self._keeper.pid
        self._place = Place.of(self.path)
        self._own_directory = directory is None

    def fail(
        self,
        what: str = "data",
        *,
        errno: int = EIO,
        marker: bytes | None = None,
        start: int = 0,
        end: int | None = None,
        skip: int = 0,
    ) -> None:
        """Let requests fail from now on, in addition to those that fail already.

        what: "data" (writes that hold the marker), "metadata" (writes that do not), "all" (every write, flush and
            discard), or one kind of request: "write", "read", "flush", "discard" (which is also how zeros are written).
        errno: what the disk answers. The loop driver passes ENOSPC, ETIMEDOUT and the like on for reads and writes;
            what it has no block status for, and any error of a flush, becomes EIO.
        marker: only writes that contain these bytes ("data" without one: `disk.marker`).
        start, end: only requests that touch this range of the disk, in bytes; end None: to its end.
        skip: so many of the requests that are meant go well first.
        """
        if what not in image.MEANING:
            raise ValueError(f"a disk cannot fail {what!r}: there are {', '.join(image.MEANING)}")
        if marker is not None and what not in image.MARKED:
            raise ValueError(f"a marker tells writes apart, which {what!r} are not")
        if marker is None:
            marker = self.marker if what in ("data", "metadata") else b""
        self._serving.ask("fail", what=what, code=errno, marker=marker.hex(), start=start, end=end, skip=skip)

    def heal(self) -> None:
        """Every request succeeds again."""
        self._serving.ask("heal")

    @property
    def is_mounted(self) -> bool:
        """Whether nobody else has unmounted it."""
        return self._place.is_there

    def hang(self, limit: float = 60.0) -> None:
        """Answer nothing, neither good nor bad, until resume(), or for `limit` seconds.

        The limit is there because a process that waits for a disk cannot be killed, and a sync(2) of anybody waits.
        """
        self._serving.ask("hang", limit=limit)

    def resume(self) -> None:
        """Answer what has piled up since hang(), and go on."""
        self._serving.ask("resume")

    def push(self, seconds: float = 30.0) -> None:
        """Write out exactly this filesystem's dirty pages, telling nobody how that went: no error cursor is moved on.

        BLKFLSBUF on the block device (block/ioctl.c, blkdev_flushbuf). TimeoutError after `seconds`; the kernel goes
        on trying.
        """
        self._control.ask("push", patience=seconds + 10.0, seconds=seconds)

    def counters(self) -> image.Counters:
        """What has reached the disk so far."""
        return image.Counters(*self._serving.ask("counters"))

    def snapshot(self, path: str | os.PathLike[str] | None = None, *, durable: bool = False) -> Snapshot:
        """What the disk holds: every write it has acknowledged, and nothing of the kernel's caches.

        durable: what a power cut would leave at the least: what had been acknowledged at the last flush that succeeded.
        path: a file to keep it in as well (sparse), for Disk(image=path).
        """
        if path is None:
            fd = os.memfd_create("overt-lab-snapshot", os.MFD_CLOEXEC)
        else:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            self._serving.ask("snapshot", patience=60.0, fds=[fd], durable=durable)
            return Snapshot(fd, self.size, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)

    def record(self) -> Recording:
        """From now on keep what is acknowledged, in order, and in memory. To be closed; ends with the disk, or anew."""
        base = os.memfd_create("overt-lab-base", os.MFD_CLOEXEC)
        log = os.memfd_create("overt-lab-log", os.MFD_CLOEXEC)
        recording = Recording(base, log)
        try:
            self._serving.ask("record", patience=60.0, fds=[base, log])
        except BaseException:
            recording.close()
            raise
        return recording

    def recorded(self) -> int:
        """The present moment of the recording, as Request.end says it."""
        return int(self._serving.ask("recorded"))

    def close(self) -> None:
        """Heal, unmount, and take everything away, within bounded time; once.

        Whoever still uses the filesystem (an open file, another mount namespace) gets I/O errors from then on. Does
        nothing in a fork of the process that made the disk. OSError if something is left behind.
        """
        if not self._open or os.getpid() != self._owner:
            return
        self._open = False
        try:
            try:
                self._control.ask("close", patience=_TEAR_DOWN, cut=not self._healthy())
            except ConnectionResetError:
                self._close_without_keeper()
        finally:
            self._let_go()

    def _healthy(self) -> bool:
        """Healed, so that it unmounts quietly and at once. False: the server is dead, or stopped."""
        try:
            for verb in ("heal", "resume"):
                self._serving.ask(verb, patience=2.0)
        except (ConnectionResetError, TimeoutError):
            return False
        return True

    def _close_without_keeper(self) -> None:
        """It was killed, and the server with it: nothing waits any more."""
        self._place.unmount()
        if self._own_directory:
            os.rmdir(self.path)

    def _let_go(self) -> None:
        self._control.close()
        self._serving.close()
        try:
            self._keeper.wait(_TEAR_DOWN)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _start_keeper(fds: tuple[int, int, int], owner: int) -> subprocess.Popen[bytes]:
    source = str(Path(overt.__file__).parent.parent)
    words = [source, *(str(number) for number in (*fds, owner))]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _KEEPER, *words],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # Ctrl-C is for the user; the disk is still needed while that cleans up
    )


def _options(*words: str) -> tuple[list[tuple[str, str | None]], int]:
    """Options of mount(8), sorted into the filesystem's own, for fsconfig(2), and the mount's, MOUNT_ATTR_*."""
    own: list[tuple[str, str | None]] = []
    attributes = 0
    for word in filter(None, ",".join(words).split(",")):
        key, equals, value = word.partition("=")
        if key in _ATTRIBUTES:
            attributes |= _ATTRIBUTES[key]
        else:
            own.append((key, value if equals else None))
    return own, attributes
