"""Notifications: messages that the server sends of its own accord, to make the kernel forget what it has cached.

Each function returns the bytes of one write to /dev/fuse. The write fails with ENOENT when the kernel has no such inode
or entry, which is not an error: there was nothing to forget. INVAL_ENTRY and DELETE take the directory's lock, so they
must not be written by the thread that has to answer the request which holds that lock: it would wait for itself.
Source: fs/fuse/dev.c (fuse_notify), fs/fuse/dir.c (fuse_reverse_inval_entry).
"""

from overt.wire.fuse import (
    FUSE_NOTIFY_DELETE,
    FUSE_NOTIFY_INVAL_ENTRY,
    FUSE_NOTIFY_INVAL_INODE,
    NotifyDeleteOut,
    NotifyInvalEntryOut,
    NotifyInvalInodeOut,
    OutHeader,
)
from overt.wire.record import struct_of

_INODE = struct_of(OutHeader, NotifyInvalInodeOut)
_ENTRY = struct_of(OutHeader, NotifyInvalEntryOut)
_DELETE = struct_of(OutHeader, NotifyDeleteOut)


def inval_inode(nodeid: int, offset: int = 0, length: int = 0) -> bytes:
    """Forget the inode's attributes, and its data from `offset` for `length` bytes (0: to the end).

    A negative `offset` leaves the data alone.
    """
    return _INODE.pack(_INODE.size, FUSE_NOTIFY_INVAL_INODE, 0, nodeid, offset, length)


def inval_entry(parent: int, name: bytes, flags: int = 0) -> bytes:
    """Forget what `name` in `parent` is; with FUSE_EXPIRE_ONLY look it up again at its next use, even if it is busy."""
    size = _ENTRY.size + len(name) + 1
    return _ENTRY.pack(size, FUSE_NOTIFY_INVAL_ENTRY, 0, parent, len(name), flags) + name + b"\0"


def delete(parent: int, child: int, name: bytes) -> bytes:
    """Say that `name` was removed from `parent`, if the kernel still takes it for `child`."""
    size = _DELETE.size + len(name) + 1
    return _DELETE.pack(size, FUSE_NOTIFY_DELETE, 0, parent, child, len(name)) + name + b"\0"
