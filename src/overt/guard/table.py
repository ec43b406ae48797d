"""Which overlay a descriptor of a container's is of, found out without touching the file.

The file may be of a FUSE filesystem whose server never answers, the container's own. So it is neither opened nor
borrowed: fstatfs(2) would ask the server, and so would close(2). statx(2) with AT_STATX_DONT_SYNC, through
/proc/TID/fd/N, asks nobody and gives the mount's id. That is remembered: an id belongs to one mount for ever. What the
mount is, is in the mountinfo of the thread, or, after a chroot, in that of the container's first process.
"""

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from overt.host import files

_MOST = 1 << 16
"""mounts remembered; a container can make any number"""


class Mounted(NamedTuple):
    """A mount, and the superblock behind it, as mountinfo has them (proc_pid_mountinfo(5))."""

    device: int
    """the superblock's number"""
    point: bytes
    """from the root of the process that was asked"""
    upperdir: bytes
    """of an overlay, as whoever mounted it said; empty: nothing can be written to it"""
    workdir: bytes
    volatile: bool

    @property
    def lies(self) -> bool:
        """Whether the kernel's own answer to syncfs(2) may be wrong: an ordinary overlay's with an upper."""
        return bool(self.upperdir and self.workdir) and not self.volatile


def read(pid: int) -> dict[int, Mounted]:
    """The mounts that a process sees, by the id that mountinfo gives them. OSError if it is gone."""
    found = {}
    with open(f"/proc/{pid}/mountinfo", "rb") as lines:
        for line in lines:
            left, _, right = line.rstrip(b"\n").partition(b" - ")
            number, _, device, _, point, *_ = left.split(b" ")
            kind, _, words = right.split(b" ", 2)
            options = dict(word.partition(b"=")[::2] for word in words.split(b",")) if kind == b"overlay" else {}
            major, minor = map(int, device.split(b":"))
            found[int(number)] = Mounted(
                os.makedev(major, minor),
                _unescape(point),
                _unescape(options.get(b"upperdir", b"")),
                _unescape(options.get(b"workdir", b"")),
                b"volatile" in options or options.get(b"fsync") == b"volatile",
            )
    return found


class Walk:
    """What is remembered while the descriptors of many processes are asked about, one process after another."""

    def __init__(self) -> None:
        self.nowhere: dict[int, int] = {}
        """st_dev of files on mounts that nobody sees, by the mount's id"""
        self._tid = 0
        self._mounts: dict[int, Mounted] = {}

    def mounts(self, tid: int) -> dict[int, Mounted]:
        """What thread `tid` sees, read once. OSError if it is gone."""
        if self._tid != tid:
            self._mounts, self._tid = read(tid), tid
        return self._mounts


class Table:
    """Mounts that were asked about. Any thread may use it."""

    def __init__(self) -> None:
        self._known: dict[int, Mounted] = {}

    def mount_of(self, place: bytes, pids: Iterable[int]) -> Mounted | int:
        """The mount that the descriptor `place` (/proc/TID/fd/N) is on, looked for in what `pids` see.

        Where none of them sees it (a pipe; a detached mount), the file's st_dev. OSError: ENOENT without such a
        descriptor or process.
        """
        where = files.whereabouts(place)
        known = self._known.get(where.mount)
        if known is not None:
            return known
        for pid in pids:
            try:
                mounts = read(pid)
            except OSError:  # it has ended
                continue
            if self._learn(where.mount, place, mounts):
                return self._known[where.mount]
        return where.device

    def _learn(self, mount: int, place: bytes, mounts: dict[int, Mounted]) -> bool:
        """Remember which of `mounts` the mount with this id is; False if it is none of them."""
        found = mounts.get(files.whereabouts(place, files.STATX_MNT_ID).mount)
        # A number in mountinfo is given away again: was it this mount's all the time?
        if found is None or files.whereabouts(place).mount != mount:
            return False
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[mount] = found
        return True

    def device_of(self, place: bytes, tid: int, walk: "Walk | None" = None) -> int:
        """The superblock's number, or st_dev where thread `tid` does not see the mount. `walk`: for many questions."""
        if walk is None:
            mounted = self.mount_of(place, (tid,))
            return mounted if isinstance(mounted, int) else mounted.device
        where = files.whereabouts(place)
        known = self._known.get(where.mount)
        if known is not None:
            return known.device
        if where.mount not in walk.nowhere:
            if not self._learn(where.mount, place, walk.mounts(tid)):
                walk.nowhere[where.mount] = where.device
                return where.device
            return self._known[where.mount].device
        return walk.nowhere[where.mount]

    def is_on(self, device: int, tid: int, place: bytes) -> bool:
        """Whether the descriptor is of this superblock, as thread `tid` sees it."""
        return self.device_of(place, tid) == device


def _unescape(path: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), path)
