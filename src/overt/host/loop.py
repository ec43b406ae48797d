"""Loop devices, loop(4)."""

import errno
import fcntl
import os
import struct
from typing import NamedTuple

LOOP_CLR_FD = 0x4C01
LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_GET_FREE = 0x4C82

LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_DIRECT_IO = 16

_CONFIG = struct.Struct("=II QQQQQ IIII 64s64s32s QQ 64x")


class Loop(NamedTuple):
    """An attached loop device: its open descriptor and its path."""

    fd: int
    path: str


def attach(backing: int, *, flags: int = LO_FLAGS_AUTOCLEAR, block_size: int = 512, name: str = "overt") -> Loop:
    """Attach a free loop device to the open file `backing`; `block_size` in bytes, `name` shows in losetup(8).

    With LO_FLAGS_AUTOCLEAR the device lets go of the file with its last user (close `fd` only when something else,
    a mount, uses it). Raises OSError: EACCES or ENOENT where loop devices are not to be had.
    """
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        while True:
            path = f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}"
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            config = _CONFIG.pack(backing, block_size, *[0] * 5, 0, 0, 0, flags, name.encode()[:63], b"", b"", 0, 0)
            try:
                fcntl.ioctl(fd, LOOP_CONFIGURE, config)
                return Loop(fd, path)
            except OSError as error:
                os.close(fd)
                if error.errno != errno.EBUSY:  # EBUSY: somebody else was given the same number
                    raise
    finally:
        os.close(control)


def detach(fd: int) -> None:
    """Detach the device (at once, or when its last user is gone: the kernel then sets AUTOCLEAR)."""
    fcntl.ioctl(fd, LOOP_CLR_FD)
