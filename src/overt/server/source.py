"""What a mount on a block device is called where mounts are listed: its source.

The kernel looks a source up as a path, from the working directory of the thread that mounts, and lists it as it was
given (fs/super.c, get_tree_bdev). So the device has the wanted name for as long as that takes: as a link in a directory
that is in memory and in no tree, where nobody else can put anything, and in which the thread stands meanwhile.

That mount(8) finds the source of a line of fstab(5) among the mounts is how `mount -a` knows that it is mounted.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from overt.host import mounts
from overt.server.identity import own_umask

_lock = threading.Lock()
_directory = -1


@contextmanager
def named(name: str, device: str) -> Iterator[None]:
    """Have the block device be found by `name`, by the calling thread only, which is in / afterwards.

    OSError where that cannot be had. Few calls: each of them lets other threads run.
    """
    global _directory
    own_umask()  # and with it a working directory of its own
    with _lock:
        if _directory < 0:
            _directory = mounts.new_mount("tmpfs", [("mode", "700")])
        os.symlink(device, name, dir_fd=_directory)
        try:
            os.fchdir(_directory)
            yield
        finally:
            os.chdir("/")
            os.unlink(name, dir_fd=_directory)
