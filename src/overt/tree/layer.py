"""A layer: one directory tree, held by a mount of its own.

Each layer is a detached clone of the mount it lives on (as overlayfs does, clone_private_mount): submounts are not in
it, lower layers are read-only through it whatever a caller does, and reading them changes no access time.
"""

import errno
import os
from collections import deque

from overt.host import mounts
from overt.overlay import marks

UPPER = 0
"""The index of the upper layer; lower layers are 1, 2, ... from the top. Without an upper there is no layer 0."""


class Layer:
    """One opened layer; `root` is an O_PATH descriptor, `device` its st_dev."""

    LOWER = mounts.MOUNT_ATTR_RDONLY | mounts.MOUNT_ATTR_NOATIME | mounts.MOUNT_ATTR_NODEV
    """what the mount of a lower layer has to be; devices are opened by the kernel in front of us, and never here"""

    __slots__ = ("device", "index", "oci_whiteouts", "prefix", "root", "xattr_whiteouts")

    def __init__(self, index: int, root: int, prefix: bytes = marks.PREFIX, *, oci_whiteouts: bool = False) -> None:
        """`root`: a descriptor of the layer on a mount of its own, which the layer closes; `prefix`: of the marks.

        `oci_whiteouts`: files called .wh.NAME are whiteouts, too.
        """
        self.oci_whiteouts = oci_whiteouts
        self.prefix = prefix
        self.index = index
        self.root = root
        self.device = os.fstat(self.root).st_dev
        mark = self._mark(self.root, b".", marks.OPAQUE) if index != UPPER else None
        self.xattr_whiteouts = mark == marks.OPAQUE_WITH_XATTR_WHITEOUTS

    def close(self) -> None:
        """Let go of the layer."""
        os.close(self.root)

    def _mark(self, directory: int, name: bytes, mark: bytes) -> bytes | None:
        """The value of one of a file's marks; None without it."""
        try:
            return os.getxattr(xattr_path(directory, name), self.prefix + mark, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
            return None

    def is_opaque(self, directory: int, name: bytes) -> bool:
        """Whether a directory hides what is below; EPERM if the layer says that this is to be found elsewhere.

        The kernel says the same where redirects are not followed (redirect_dir=nofollow).
        """
        if self.oci_whiteouts and self._is_oci_opaque(directory, name):
            return True
        try:
            if not os.listxattr(xattr_path(directory, name), follow_symlinks=False):
                return False
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return False
        if self._mark(directory, name, marks.REDIRECT) is not None:
            raise OSError(errno.EPERM, "a redirected directory")
        return self._mark(directory, name, marks.OPAQUE) == marks.OPAQUE_YES

    def _is_oci_opaque(self, directory: int, name: bytes) -> bool:
        path = xattr_path(directory, name)
        if os.path.lexists(path + b"/" + marks.OCI_OPAQUE):
            return True
        try:
            return os.getxattr(path, marks.FUSE_OVERLAYFS_OPAQUE, follow_symlinks=False) == marks.OPAQUE_YES
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
            return False

    def hides(self, directory: int, name: bytes) -> bool:
        """Whether an OCI whiteout in this directory of the layer hides `name` in the layers below."""
        return self.oci_whiteouts and os.path.lexists(xattr_path(directory, marks.OCI_WHITEOUT + name))

    def must_have_data(self, directory: int, name: bytes, st: os.stat_result) -> None:
        """EPERM for a file that another overlay has copied up without its data (as the kernel with metacopy=off)."""
        possible = marks.may_be_metacopy(st.st_mode, st.st_size, st.st_blocks)
        if possible and self._mark(directory, name, marks.METACOPY) is not None:
            raise OSError(errno.EPERM, "a file without its data")

    def is_xattr_whiteout(self, directory: int, name: bytes, st: os.stat_result) -> bool:
        """Whether a file of this layer is an empty regular one that carries the whiteout mark."""
        if not self.xattr_whiteouts or not marks.may_be_xattr_whiteout(st.st_mode, st.st_size):
            return False
        return self._mark(directory, name, marks.WHITEOUT) is not None


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

    @property
    def full(self) -> bool:
        """Whether it is over the limit."""
        return len(self._held) > self.limit

    def trim(self) -> None:
        """Close what is over the limit."""
        held = self._held
        while len(held) > self.limit:
            fds, layer = held.popleft()
            fd = fds.pop(layer, None)
            if fd is not None:
                os.close(fd)
