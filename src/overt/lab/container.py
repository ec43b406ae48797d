"""What makes a process a container here: a mount namespace of its own, and pivot_root(2), as in any runtime."""

import os

from overt.host import mounts, process
from overt.host.libc import check, libc


def enter(mount: int, place: str) -> None:
    """Make the detached `mount` (closed here) the root of this process, and let go of everything else.

    `place` is a directory where it is attached on the way. (pivot_root(2), "pivot_root(".", ".")")
    """
    process.unshare(process.CLONE_NEWNS)
    mounts.attach(mount, place)
    os.close(mount)
    os.chdir(place)
    check(libc.pivot_root(b".", b"."))
    mounts.umount(".", mounts.MNT_DETACH)
    os.chdir("/")


def close_all_but(*keep: int) -> None:
    """Close every descriptor but 0, 1, 2 and these."""
    start = 3
    for fd in (*sorted(keep), os.sysconf("SC_OPEN_MAX")):
        os.closerange(start, fd)
        start = fd + 1
