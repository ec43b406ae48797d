"""Where a copy came from, in words that outlast a mount: overlayfs's file handles (fs/overlayfs/copy_up.c, namei.c).

A copy carries the handle of the lower file as its origin, so that it can show that file's inode number for ever. What
is in an xattr may be anything: a handle is used only if it is one, was made on a machine like this one, and leads to a
file of a lower layer and of the same type.
"""

import sys
from struct import error
from typing import NamedTuple

from overt.wire.overlay import ANY_ENDIAN, BIG_ENDIAN, MAGIC, PATH_UPPER, VERSION, FileHandle
from overt.wire.record import pack, size_of, unpack_from

UNKNOWN = b""
"""the origin of a copy of which there is no handle; such an xattr says that it is a copy all the same"""

_HEAD = size_of(FileHandle)
_OURS = BIG_ENDIAN if sys.byteorder == "big" else 0
_KNOWN = BIG_ENDIAN | ANY_ENDIAN | PATH_UPPER
_LONGEST = 255


class Origin(NamedTuple):
    """A file of a layer: the UUID of its filesystem (16 bytes), and its handle there (name_to_handle_at(2))."""

    uuid: bytes
    type: int
    handle: bytes


def encode(origin: Origin, *, upper: bool = False) -> bytes:
    """The value of the xattr, for a file of the `upper` or a lower layer; UNKNOWN for a handle that does not fit."""
    length = _HEAD + len(origin.handle)
    if length > _LONGEST or not 0 <= origin.type < 256:
        return UNKNOWN
    flags = _OURS | PATH_UPPER if upper else _OURS
    return pack(FileHandle(VERSION, MAGIC, length, flags, origin.type, origin.uuid)) + origin.handle


def decode(value: bytes) -> Origin | None:
    """What the value of an xattr says; None if that is nothing that can be used here (ovl_check_fb_len)."""
    try:
        head = unpack_from(FileHandle, value)
    except error:
        return None
    if head.magic != MAGIC or head.version != VERSION or not _HEAD <= head.length <= len(value):
        return None
    if head.flags & ~_KNOWN or not (head.flags & ANY_ENDIAN or head.flags & BIG_ENDIAN == _OURS):
        return None
    return Origin(head.uuid, head.type, value[_HEAD : head.length])
