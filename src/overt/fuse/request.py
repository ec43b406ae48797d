"""A request, as the filesystem gets it, and the exception for one that it does not get."""

from typing import Any

from overt.wire.fuse import OutHeader
from overt.wire.record import struct_of

from .opcodes import NAMES

_OUT = struct_of(OutHeader)


class Request:
    """What somebody asked of the filesystem. Filled in by `Session.decode` alone."""

    __slots__ = ("arg", "gid", "interrupted", "name", "name2", "nodeid", "opcode", "payload", "pid", "uid", "unique")

    unique: int
    opcode: int
    nodeid: int
    uid: int
    gid: int
    pid: int  # a thread id, as seen from the mount's pid namespace; 0 if it is not seen from there
    arg: tuple[Any, ...]  # the opcode's record; of FORGET and BATCH_FORGET, pairs (nodeid, lookups)
    name: bytes
    name2: bytes
    payload: memoryview | bytes  # of WRITE, SETXATTR, IOCTL; a view of the reader's buffer until `keep`
    interrupted: bool

    def keep(self) -> None:
        """Copy the payload, so that the request outlives the next read into the buffer it came in."""
        self.payload = bytes(self.payload)

    def __repr__(self) -> str:
        names = b" ".join((self.name, self.name2)).strip()
        return f"<{NAMES[self.opcode]} {self.unique} nodeid={self.nodeid} {self.arg} {names!r}>"


class Refused(Exception):
    """A request that is not as the protocol says. Write `reply`, unless it is empty: then nobody must be answered."""

    def __init__(self, unique: int, errno: int, why: str) -> None:
        super().__init__(why)
        self.unique = unique
        self.errno = errno

    @property
    def reply(self) -> bytes:
        """What to write to /dev/fuse; empty when there is nothing to write."""
        return _OUT.pack(_OUT.size, -self.errno, self.unique) if self.unique else b""
