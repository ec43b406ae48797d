"""The other end of the connection: requests as the kernel would send them, made from the opcode table."""

from collections.abc import Callable
from struct import unpack_from
from typing import Any

import pytest

from overt.fuse.opcodes import OPCODES, Opcode
from overt.fuse.session import Session
from overt.wire import fuse
from overt.wire.record import pack, size_of, struct_of

EVERY_FLAG = (1 << 44) - 1
ROWS = {row.name: row for row in OPCODES}


class Kernel:
    """Encodes requests and takes replies apart."""

    def request(
        self,
        row: Opcode | str,
        unique: int = 2,
        arg: tuple[int, ...] | None = None,
        names: tuple[bytes, ...] = (),
        payload: bytes = b"",
        *,
        nodeid: int = 1,
        extensions: bytes = b"",
        record: type[tuple[Any, ...]] | None = None,
    ) -> bytearray:
        """One request; a record that is not given is zeros, but for the length of the payload."""
        row = ROWS[row] if isinstance(row, str) else row
        record = record or row.record
        body = b""
        if record is not None:
            layout = struct_of(record)
            values = list(arg) if arg is not None else list(layout.unpack(bytes(layout.size)))
            if row.payload is not None:
                values[record._fields.index(row.payload.field)] = len(payload) // row.payload.unit  # type: ignore[attr-defined]
            body = layout.pack(*values)
        body += b"".join(name + b"\0" for name in names) + payload + extensions
        header = fuse.InHeader(40 + len(body), row.number, unique, nodeid, 1000, 100, 4321, len(extensions) // 8)
        return bytearray(pack(header) + body)

    def session(
        self,
        log: Callable[[str], None] = lambda line: None,
        *,
        wanted: int = EVERY_FLAG,
        offered: int = EVERY_FLAG,
        minor: int = 46,
        max_write: int = 1 << 20,
    ) -> Session:
        """A session that has answered INIT."""
        session = Session(wanted, max_write, log)
        request = self.request("INIT", 2, (7, minor, 131072, offered & 0xFFFFFFFF, offered >> 32))
        reply = session.init(session.decode(request, len(request)))
        assert self.header(reply) == (80, 0, 2)
        return session

    def header(self, reply: bytes | memoryview) -> tuple[int, int, int]:
        """(length, error, unique), having checked that the length is the reply's."""
        length, error, unique = struct_of(fuse.OutHeader).unpack_from(reply)
        assert length == len(reply)
        return length, error, unique

    def body(self, reply: bytes | memoryview, *records: type[tuple[Any, ...]]) -> tuple[int, ...]:
        """The fields of a successful reply that consists of these records and nothing else."""
        length, error, _ = self.header(reply)
        assert error == 0
        assert length == 16 + size_of(*records)
        return struct_of(*records).unpack_from(reply, 16)

    def entries(self, reply: bytes | memoryview, plus: bool) -> list[tuple[tuple[int, ...], int, int, int, bytes]]:
        """What the kernel sees in a directory: (the EntryOut's fields, ino, cookie, type, name)."""
        length, error, _ = self.header(reply)
        assert error == 0
        found, at, head = [], 16, size_of(fuse.EntryOut) if plus else 0
        while at < length:
            entry = struct_of(fuse.EntryOut).unpack_from(reply, at) if plus else ()
            ino, cookie, namelen, kind = unpack_from("=QQII", reply, at + head)
            name = bytes(reply[at + head + 24 : at + head + 24 + namelen])
            stop = at + head + 24 + (namelen + 7 & ~7)
            assert not any(reply[at + head + 24 + namelen : stop])
            found.append((entry, ino, cookie, kind, name))
            at = stop
        assert at == length
        return found


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    return Kernel()
