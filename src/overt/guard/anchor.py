"""A hold on a mount for the moment in which it is found out whose it is.

It is an O_PATH descriptor: opening and closing one asks no filesystem anything, and as long as it is there the mount's
superblock lives, so that nobody else has its device number. It also keeps the mount from being unmounted, and so it is
let go as soon as the superblock is marked.
"""

import errno
import os

from overt.guard.table import Mounted, Table
from overt.host import files

_RESOLVE = files.RESOLVE_IN_ROOT | files.RESOLVE_NO_MAGICLINKS


class Anchor:
    """See above."""

    def __init__(self, fd: int, mounted: Mounted) -> None:
        self._fd = fd
        self.mounted = mounted

    @property
    def path(self) -> bytes:
        """A path of the file, for this process."""
        return _path(self._fd)

    def close(self) -> None:
        """Let go, if that was not done yet."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def of_descriptor(tid: int, fd: int, mounted: Mounted) -> Anchor:
    """By descriptor `fd` of thread `tid`, which was seen on a mount. OSError: FileNotFoundError if it is not there."""
    ours = os.open(b"/proc/%d/fd/%d" % (tid, fd), os.O_PATH)
    try:
        if files.whereabouts(_path(ours)).mount != mounted.id:
            raise FileNotFoundError(errno.ENOENT, f"descriptor {fd} of {tid} is another file now")
    except BaseException:
        os.close(ours)
        raise
    return Anchor(ours, mounted)


def of_mount(pid: int, mounted: Mounted, table: Table) -> Anchor:
    """By the place where a process sees a mount. FileNotFoundError where another is mounted over it.

    It takes as long as servers of filesystems on the way there take.
    """
    root = os.open(b"/proc/%d/root" % pid, os.O_PATH | os.O_DIRECTORY)
    try:
        ours = files.openat2(root, mounted.point, os.O_PATH, resolve=_RESOLVE)
    finally:
        os.close(root)
    try:
        found = table.mount_of(_path(ours), (pid,))
        if isinstance(found, int) or found.device != mounted.device or not found.lies:
            raise FileNotFoundError(errno.ENOENT, "another is mounted over it", os.fsdecode(mounted.point))
    except BaseException:
        os.close(ours)
        raise
    return Anchor(ours, found)


def _path(fd: int) -> bytes:
    return b"/proc/self/fd/%d" % fd
