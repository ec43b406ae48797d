"""Byte layouts of overlayfs's marks (fs/overlayfs/overlayfs.h)."""

from typing import Annotated, NamedTuple

from overt.wire.record import U8

Uuid = Annotated[bytes, "16s"]


class FileHandle(NamedTuple):
    """struct ovl_fb: the head of a file handle in an xattr; what name_to_handle_at(2) gives follows."""

    version: U8
    magic: U8
    length: U8
    """of the whole, in bytes"""
    flags: U8
    type: U8
    uuid: Uuid
    """of the filesystem that the file is on"""


VERSION = 0
MAGIC = 0xFB

# flags
BIG_ENDIAN = 1
ANY_ENDIAN = 2
PATH_UPPER = 4
"""the file is in the upper"""
