"""struct linux_dirent64, as getdents64(2) returns it: a run of records, each as long as its own d_reclen says.

Names are bytes and stay bytes. "." and ".." are returned like any other entry: whether to leave them out is the
caller's business.
"""

from struct import Struct, error
from typing import NamedTuple

from .record import I64, U8, U16, U64, size_of


class LinuxDirent64(NamedTuple):
    d_ino: U64
    d_off: I64
    d_reclen: U16
    d_type: U8


NAME_OFFSET = size_of(LinuxDirent64)
# Without d_off, which only the directory that it came from understands.
_INO_RECLEN_TYPE = Struct("=Q8xHB")


def parse(buffer: bytes | bytearray | memoryview, size: int) -> list[tuple[int, int, bytes]]:
    """Return (inode number, d_type, name) for each entry in the first `size` bytes of `buffer`.

    Raises ValueError when a record's length cannot be right. Source: getdents64(2), fs/readdir.c.
    """
    data = bytes(memoryview(buffer)[:size])
    entries = []
    unpack, index, start = _INO_RECLEN_TYPE.unpack_from, data.index, 0
    try:
        while start < size:
            ino, length, kind = unpack(data, start)
            stop = start + length
            name = start + NAME_OFFSET
            entries.append((ino, kind, data[name : index(b"\0", name, stop)]))
            start = stop
    except (ValueError, error):
        start = -1
    if start != size:
        raise ValueError(f"getdents64: a malformed record after {len(entries)} entries, in {size} bytes")
    return entries
