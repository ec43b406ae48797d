"""Attributes and timeouts, packed once and then pasted into replies.

A reply that carries attributes repeats 16 integers that change less often than they are asked for, and four that never
change while a mount lives. Both travel as bytes here: packing them again for each reply would cost twice as much as all
the rest of the reply, and whoever caches attributes caches 88 bytes.
"""

from os import stat_result
from struct import Struct
from typing import NamedTuple

from overt.wire.fuse import Attr
from overt.wire.record import struct_of

_pack = struct_of(Attr).pack
_SECOND = 1_000_000_000
_OWNER = Struct("=III")
_OWNER_AT = struct_of(Attr).size - 6 * 4
_ENTRY = Struct("=QQII")
_ATTR = Struct("=QI4x")


class Validity(NamedTuple):
    """How long the kernel may keep what a reply says; made by `validity`."""

    entry: bytes  # entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec, as in an EntryOut
    attr: bytes  # attr_valid, attr_valid_nsec, padding, as in an AttrOut


def validity(entry_ns: int, attr_ns: int) -> Validity:
    """Return the timeouts of a name and of attributes, both in nanoseconds, as replies take them."""
    entry, entry_rest = divmod(entry_ns, _SECOND)
    attr, attr_rest = divmod(attr_ns, _SECOND)
    return Validity(_ENTRY.pack(entry, attr, entry_rest, attr_rest), _ATTR.pack(attr, attr_rest))


def attr_of(st: stat_result, ino: int, nlink: int | None = None, flags: int = 0, blocks: int | None = None) -> bytes:
    """Return a packed Attr: what `st` says, except for the inode number (and links and blocks, where they are given).

    `flags` are FUSE_ATTR_*. Times keep their nanoseconds; seconds before 1970 are negative and their nanoseconds are
    not, as in a timespec.
    """
    # A stat_result unpacks into its first ten fields, times in whole seconds, for the price of one attribute access.
    mode, _, _, links, uid, gid, size, atime, mtime, ctime = st
    return _pack(
        ino,
        size,
        st.st_blocks if blocks is None else blocks,
        atime,
        mtime,
        ctime,
        st.st_atime_ns % _SECOND,
        st.st_mtime_ns % _SECOND,
        st.st_ctime_ns % _SECOND,
        mode,
        links if nlink is None else nlink,
        uid,
        gid,
        st.st_rdev,
        st.st_blksize,
        flags,
    )


def with_owner(attr: bytes, nlink: int | None, uid: int, gid: int) -> bytes:
    """A packed Attr with another owner, and another link count where one is given."""
    if nlink is None:
        nlink = _OWNER.unpack_from(attr, _OWNER_AT)[0]
    return attr[:_OWNER_AT] + _OWNER.pack(nlink, uid, gid) + attr[_OWNER_AT + _OWNER.size :]
