"""What only btrfs can say of itself."""

import fcntl
import struct

_TREE_SEARCH = 0xD0009411  # BTRFS_IOC_TREE_SEARCH, <linux/btrfs.h>
_ROOT_TREE, _ROOT_ITEM = 1, 132  # <linux/btrfs_tree.h>
_FIRST, _LAST = 256, (1 << 64) - 256
"""the numbers that subvolumes may have; the filesystem's own tree, which is always there, is not among them"""
_MAX = (1 << 64) - 1
_KEY = struct.Struct("=QQQQQQQIIII32x")
_NUMBER = struct.Struct("=64xI")


def has_subvolumes(fd: int) -> bool:
    """Whether the btrfs of `fd` has subvolumes or snapshots, so that inode numbers there are not unique.

    OSError: ENOTTY where it is no btrfs, EPERM without CAP_SYS_ADMIN.
    """
    # tree, objectid from and to, offset from and to, transid from and to, type from and to, how many, unused
    key = _KEY.pack(_ROOT_TREE, _FIRST, _LAST, 0, _MAX, 0, _MAX, _ROOT_ITEM, _ROOT_ITEM, 1, 0)
    room = bytearray(4096)
    room[: len(key)] = key
    fcntl.ioctl(fd, _TREE_SEARCH, room)
    return bool(_NUMBER.unpack_from(room)[0])
