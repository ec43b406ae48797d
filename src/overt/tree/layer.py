"""A layer: one directory tree, held by a mount of its own.

Each layer is a detached clone of the mount it lives on (as overlayfs does, clone_private_mount): submounts are not in
it, lower layers are read-only through it whatever a caller does, and reading them changes no access time.
"""

import os
from collections import deque

from overt.host import mounts
from overt.overlay import marks

UPPER = 0
"""The index of the upper layer; lower layers are 1, 2, ... from the top. Without an upper there is no layer 0."""


class Layer:
    """One opened layer; `root` is an O_PATH descriptor, `device` its st_dev."""

    LOWER = mounts.MOUNT_ATTR_RDONLY | mounts.MOUNT_ATTR_NOATIME
    """what the mount of a lower layer has to be"""

    __slots__ = ("device", "index", "prefix", "root", "xattr_whiteouts")

    def __init__(self, index: int, root: int, prefix: bytes = marks.PREFIX) -> None:
        """`root`: a descriptor of the layer on a mount of its own, which the layer closes; `prefix`: of the marks."""
        self.prefix = prefix
        self.index = index
        self.root = root
        self.device = os.fstat(self.root).st_dev
        mark = self.opaque_mark(self.root, b".") if index != UPPER else b""
        self.xattr_whiteouts = mark == marks.OPAQUE_WITH_XATTR_WHITEOUTS

    def close(self) -> None:
        """Let go of the layer."""
        os.close(self.root)

    def opaque_mark(self, directory: int, name: bytes) -> bytes:
        """The value of a directory's opaque mark, empty without one."""
        try:
            return os.getxattr(xattr_path(directory, name), self.prefix + marks.OPAQUE, follow_symlinks=False)
        except OSError:  # ENODATA, or a filesystem without xattrs: no mark
            return b""

    def is_xattr_whiteout(self, directory: int, name: bytes, st: os.stat_result) -> bool:
        """Whether a file of this layer is an empty regular one that carries the whiteout mark."""
        if not self.xattr_whiteouts or not marks.may_be_xattr_whiteout(st.st_mode, st.st_size):
            return False
        try:
            os.getxattr(xattr_path(directory, name), self.prefix + marks.WHITEOUT, follow_symlinks=False)
        except OSError:  # ENODATA
            return False
        return True


def xattr_path(directory: int, name: bytes) -> bytes:
    """A path by which the l*xattr calls, which know no directory descriptors, reach one name in one."""
    return b"/proc/self/fd/%d/%b" % (directory, name)


class DescriptorCache:
    """How many directory descriptors the trees of one process keep open, oldest out first.

    Closing happens in `trim`, between requests, never while a handler holds a number it was given.
    """

    __slots__ = ("_held", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: deque[tuple[dict[int, int], int]] = deque()

    def hold(self, fds: dict[int, int], layer: int, fd: int) -> None:
        """Enter `fd` as the descriptor for `layer` in a node's `fds`."""
        fds[layer] = fd
        self._held.append((fds, layer))

    def trim(self) -> None:
        """Close what is over the limit."""
        held = self._held
        while len(held) > self.limit:
            fds, layer = held.popleft()
            fd = fds.pop(layer, None)
            if fd is not None:
                os.close(fd)
