"""A layout declared once, as a NamedTuple.

A record of the kernel is a C struct of integers. Here it is a NamedTuple whose annotations carry the format characters
of the struct module, so that the declaration reads like the header it mirrors:

    class FsyncIn(NamedTuple):
        fh: U64
        fsync_flags: U32P4

From it follow the compiled `struct.Struct` (`struct_of`), the size, each field's offset, and packing both ways. A field
whose annotation is itself a record is laid out in place.

Padding belongs to the field before it (`U32P4`: 32 bits, then 4 bytes that nobody reads). A padding field of its own
would look more like C, but it would also be an int made and thrown away for each request. Sizes are the standard ones
('='), without alignment: every hole is spelt out, and a test compares sizes and offsets with what a C compiler makes of
the header.

Hot paths take `struct_of(...).unpack_from` at import time and work with plain tuples; the functions here that build
NamedTuples are for everything else.
"""

from collections.abc import Iterator
from functools import cache
from struct import Struct, calcsize
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

U8 = Annotated[int, "B"]
U16 = Annotated[int, "H"]
U32 = Annotated[int, "I"]
U64 = Annotated[int, "Q"]
I32 = Annotated[int, "i"]
I64 = Annotated[int, "q"]

U16P2 = Annotated[int, "H2x"]
U16P22 = Annotated[int, "H22x"]
U32P4 = Annotated[int, "I4x"]
U32P8 = Annotated[int, "I8x"]
U32P12 = Annotated[int, "I12x"]
U32P16 = Annotated[int, "I16x"]
U32P28 = Annotated[int, "I28x"]
U32P44 = Annotated[int, "I44x"]
U32P112 = Annotated[int, "I112x"]
U64P8 = Annotated[int, "Q8x"]

R = TypeVar("R", bound=tuple[Any, ...])


@cache
def _fields(record: type[tuple[Any, ...]]) -> tuple[tuple[str, str, type[tuple[Any, ...]] | None], ...]:
    """Each field's name, its format without the byte order, and its record where it is a nested one."""
    fields: list[tuple[str, str, type[tuple[Any, ...]] | None]] = []
    for name, hint in get_type_hints(record, include_extras=True).items():
        if isinstance(hint, type) and issubclass(hint, tuple):
            fields.append((name, _format(hint), hint))
        else:
            fields.append((name, get_args(hint)[1], None))
    return tuple(fields)


def _format(record: type[tuple[Any, ...]]) -> str:
    return "".join(form for _, form, _ in _fields(record))


@cache
def struct_of(*records: type[tuple[Any, ...]]) -> Struct:
    """Return the compiled layout of one record, or of several that follow each other without a gap."""
    return Struct("=" + "".join(_format(record) for record in records))


def size_of(*records: type[tuple[Any, ...]]) -> int:
    """Return how many bytes the record takes (or the records, one after another)."""
    return struct_of(*records).size


def offsets_of(record: type[tuple[Any, ...]]) -> dict[str, int]:
    """Return where each field begins, in bytes from the record's start."""
    offsets, position = {}, 0
    for name, form, _ in _fields(record):
        offsets[name] = position
        position += calcsize("=" + form)
    return offsets


def unpack_from(record: type[R], buffer: bytes | bytearray | memoryview, offset: int = 0) -> R:
    """Read one record at `offset` bytes into `buffer`. Raises struct.error when the buffer is too short."""
    return _build(record, iter(struct_of(record).unpack_from(buffer, offset)))


def pack(record: tuple[Any, ...]) -> bytes:
    """Return the record's bytes, padding zeroed. Raises struct.error when a value does not fit its field."""
    return struct_of(type(record)).pack(*_flat(record))


def _build(record: type[R], values: Iterator[int]) -> R:
    fields: list[Any] = [next(values) if nested is None else _build(nested, values) for _, _, nested in _fields(record)]
    return record(*fields)


def _flat(record: tuple[Any, ...]) -> Iterator[int]:
    for value in record:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value
