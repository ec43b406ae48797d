"""What READDIR and READDIRPLUS answer: entries packed one after another until the next would not fit.

Each entry is a Dirent (after an EntryOut, in READDIRPLUS), its name, and zeros up to a multiple of 8 bytes. The cookie
is where the kernel goes on after this entry: it comes back as the offset of the next request, so it has to be one that
stays right while entries come and go. READDIRPLUS counts as a lookup of each entry whose nodeid is not 0: the kernel
will forget it again. "." and ".." must not have one, and any other entry may do without.

The buffer begins with room for the reply's header, so that a full directory leaves in one write without being copied.
"""

from collections.abc import Callable
from struct import Struct

from overt.wire.fuse import Dirent, EntryOut, OutHeader
from overt.wire.record import size_of, struct_of

from .attr import Validity

_HEADER = struct_of(OutHeader)
_DIRENT_SIZE = size_of(Dirent)
_ENTRY_SIZE = size_of(EntryOut)


class _Layouts(dict[int, tuple[int, Callable[..., None]]]):
    """(size, pack_into) of an entry, by the length of its name; "s" pads with zeros, so the layout aligns."""

    def __init__(self, head: str) -> None:
        self._head = head

    def __missing__(self, length: int) -> tuple[int, Callable[..., None]]:
        layout = Struct(f"={self._head}QQII{length + 7 & ~7}s")
        self[length] = layout.size, layout.pack_into
        return self[length]


_plain = _Layouts("")
_bare = _Layouts(f"{_ENTRY_SIZE}x")
_plus = _Layouts("QQ24s88s")


class DirBuffer:
    """Entries of one READDIR or READDIRPLUS reply, at most `max_size` bytes of them (the request's `size`)."""

    __slots__ = ("_buffer", "_end", "_used")

    def __init__(self, max_size: int) -> None:
        self._buffer = bytearray(_HEADER.size + max_size)
        self._used = _HEADER.size
        self._end = _HEADER.size + max_size

    def __len__(self) -> int:
        """Bytes of entries so far."""
        return self._used - _HEADER.size

    def add(self, ino: int, cookie: int, kind: int, name: bytes) -> bool:
        """Append an entry for READDIR; `kind` is a DT_* value. Return False, and change nothing, if it does not fit."""
        size, pack_into = _plain[len(name)]
        used = self._used + size
        if used > self._end:
            return False
        pack_into(self._buffer, self._used, ino, cookie, len(name), kind, name)
        self._used = used
        return True

    def add_bare(self, ino: int, cookie: int, kind: int, name: bytes) -> bool:
        """Append an entry for READDIRPLUS that is not looked up: ".", "..", or one that is to be asked for later."""
        size, pack_into = _bare[len(name)]
        used = self._used + size
        if used > self._end:
            return False
        pack_into(self._buffer, self._used, ino, cookie, len(name), kind, name)
        self._used = used
        return True

    def add_plus(
        self,
        nodeid: int,
        generation: int,
        valid: Validity,
        attr: bytes,
        ino: int,
        cookie: int,
        kind: int,
        name: bytes,
    ) -> bool:
        """Append an entry for READDIRPLUS, looked up once if True is returned; `attr` is a packed Attr (`attr_of`)."""
        size, pack_into = _plus[len(name)]
        used = self._used + size
        if used > self._end:
            return False
        pack_into(self._buffer, self._used, nodeid, generation, valid.entry, attr, ino, cookie, len(name), kind, name)
        self._used = used
        return True

    def reply(self, unique: int) -> memoryview:
        """Return the whole reply to request `unique`: a view of this buffer, which must not be added to afterwards."""
        _HEADER.pack_into(self._buffer, 0, self._used, 0, unique)
        return memoryview(self._buffer)[: self._used]
