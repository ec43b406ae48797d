"""File attribute flags (chattr(1), ioctl_iflags(2)), and what immutable and append-only files and directories refuse.

All flags but these two are the layer's file's own (fs/overlayfs/inode.c, ovl_fileattr_get, ovl_fileattr_set). The two
are in a mark of the upper's file (overt.overlay.protection), and a lower file has them itself. The kernel's VFS, which
holds the overlay's inode to them in kernel overlayfs, does not know them of ours: so whoever changes something asks
here. What the answer is stays with the node, and nobody asks at a look-up.
"""

import errno
import fcntl
import os
import stat
import struct
from typing import TYPE_CHECKING

from overt.host.files import FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR, FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, attributes
from overt.overlay import marks, protection
from overt.tree.layer import UPPER

if TYPE_CHECKING:
    from overt.tree.node import Node
    from overt.tree.tree import Tree

_SYNC, _NOATIME = 0x08, 0x80
_CARRIED = _SYNC | _NOATIME
"""what a copy gets of its file's own flags (OVL_COPY_FS_FLAGS_MASK)"""
_NONE = (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
"""what filesystems without flags say"""
_WORD = struct.Struct("=I")
_SIZES = {FS_IOC_GETFLAGS: 4, FS_IOC_SETFLAGS: 4, FS_IOC_FSGETXATTR: 28, FS_IOC_FSSETXATTR: 28}
_EXTENDED = (FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR)


def protection_of(tree: "Tree", node: "Node") -> int:
    """Which of `protection.IMMUTABLE` and `APPEND` a file or directory has in the overlay. OSError: its layer's."""
    known = node.protection
    if known is None:
        known = node.protection = _ask(tree, node)
    return known


def _ask(tree: "Tree", node: "Node") -> int:
    if node.layer != UPPER:
        directory, name = (node.anchor, b"") if node.anchor >= 0 else tree.at(node)
        return attributes(directory, name) & protection.BOTH
    mark, path, follow = tree.prefix + marks.PROTATTR, tree.path(node), node.anchor >= 0
    try:
        names = os.listxattr(path, follow_symlinks=follow)  # half as dear as a getxattr that fails
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return 0
    return protection.decode(os.getxattr(path, mark, follow_symlinks=follow)) if os.fsdecode(mark) in names else 0


def refuse(tree: "Tree", node: "Node", flags: int = protection.BOTH) -> None:
    """Raise EPERM for a file or directory that has one of these flags."""
    if protection_of(tree, node) & flags:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def refuse_removal(tree: "Tree", parent: "Node", node: "Node") -> None:
    """Raise EPERM if a name in `parent` may not go, which is `node` (fs/namei.c, may_delete)."""
    refuse(tree, parent)
    refuse(tree, node)


# What users see and set


def get(tree: "Tree", node: "Node", command: int) -> bytes:
    """What FS_IOC_GETFLAGS or FS_IOC_FSGETXATTR gives of a regular file or directory. OSError."""
    fd = _open(tree, node)
    try:
        return bytes(_get(tree, node, fd, command))
    finally:
        os.close(fd)


def _get(tree: "Tree", node: "Node", fd: int, command: int) -> bytearray:
    words = bytearray(_SIZES[command])
    fcntl.ioctl(fd, command, words)
    if node.layer == UPPER:
        extended = command in _EXTENDED
        both = protection.of_words(words, extended=extended) | protection_of(tree, node)
        protection.put_in_words(words, both, extended=extended)
    return words


def put(tree: "Tree", node: "Node", command: int, asked: bytes) -> None:
    """FS_IOC_SETFLAGS or FS_IOC_FSSETXATTR on a regular file or directory of the upper.

    Who may do so, and may change these two flags, was decided by the kernel in front of us (fs/file_attr.c,
    vfs_fileattr_set). OSError: EINVAL for what is not as long as the command says.
    """
    if len(asked) != _SIZES[command]:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    words, extended = bytearray(asked), command in _EXTENDED
    fd = _open(tree, node)
    try:
        wanted = protection.of_words(words, extended=extended)
        _protect(tree, node, fd, wanted)
        node.protection = wanted
        protection.put_in_words(words, 0, extended=extended)
        fcntl.ioctl(fd, command, words)
    finally:
        os.close(fd)


def _protect(tree: "Tree", node: "Node", fd: int, wanted: int) -> None:
    mark = tree.prefix + marks.PROTATTR
    if wanted:
        _mark(fd, mark, wanted)
    elif protection_of(tree, node) | _flags(fd) & protection.BOTH:
        try:
            os.removexattr(fd, mark)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise


def _mark(fd: int, mark: bytes, wanted: int) -> None:
    try:
        os.setxattr(fd, mark, protection.encode(wanted))
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM)) from None
        raise


def _open(tree: "Tree", node: "Node") -> int:
    if node.is_dir:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        return os.open(b".", flags, dir_fd=tree.dir_fd(node, node.layer))
    if not stat.S_ISREG(node.mode):  # opening a device or a FIFO does something
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
    return tree.open_own(node, os.O_RDONLY)


# Copying up


def _flags(fd: int) -> int:
    """A file's own flags; none where its filesystem has none."""
    word = bytearray(_WORD.size)
    try:
        fcntl.ioctl(fd, FS_IOC_GETFLAGS, word)
    except OSError as error:
        if error.errno not in _NONE:
            raise
    flags: int = _WORD.unpack(word)[0]
    return flags


def carry_flags(source: int, copy: int, prefix: bytes) -> None:
    """Give an open copy, which has no other name yet, what it is to have of its file's flags (ovl_copy_fileattr).

    Any thread. OSError.
    """
    flags = _flags(source)
    if flags & protection.BOTH:
        _mark(copy, prefix + marks.PROTATTR, flags)
    if not flags & _CARRIED:
        return
    word = bytearray(_WORD.size)
    try:
        fcntl.ioctl(copy, FS_IOC_GETFLAGS, word)
    except OSError as error:
        if error.errno in _NONE:
            return
        raise
    fcntl.ioctl(copy, FS_IOC_SETFLAGS, bytearray(_WORD.pack(_WORD.unpack(word)[0] & ~_CARRIED | flags & _CARRIED)))


def carry_flags_of_directory(source: int, name: bytes, work: int, copy: bytes, prefix: bytes) -> None:
    """The same for directory `name` in `source`, and its copy in the work directory."""
    how = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    original = os.open(name, how, dir_fd=source)
    try:
        fd = os.open(copy, how, dir_fd=work)
        try:
            carry_flags(original, fd, prefix)
        finally:
            os.close(fd)
    finally:
        os.close(original)
