"""Records pack, unpack and nest as their declarations say."""

from struct import error
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overt.wire import fuse
from overt.wire.record import _fields, offsets_of, pack, size_of, struct_of, unpack_from

RECORDS = [value for value in vars(fuse).values() if isinstance(value, type) and issubclass(value, tuple)]
BITS = {"B": 8, "H": 16, "I": 32, "Q": 64, "i": 32, "q": 64}


def values(record: type[tuple[Any, ...]]) -> st.SearchStrategy[Any]:
    fields = []
    for _, form, nested in _fields(record):
        bits = BITS[form[0]]
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if form[0].islower() else (0, (1 << bits) - 1)
        fields.append(values(nested) if nested else st.integers(low, high))
    return st.tuples(*fields).map(lambda row: record(*row))


@given(st.sampled_from(RECORDS).flatmap(values), st.binary(max_size=9))
def test_a_record_that_was_packed_unpacks_to_itself_at_any_offset(record: tuple[Any, ...], before: bytes) -> None:
    data = before + pack(record)
    assert len(data) - len(before) == size_of(type(record))
    assert unpack_from(type(record), data, len(before)) == record


def test_a_nested_record_is_laid_out_in_place() -> None:
    assert offsets_of(fuse.Direntplus) == {"entry_out": 0, "dirent": 128}
    assert size_of(fuse.EntryOut) == 40 + size_of(fuse.Attr)


def test_records_that_follow_each_other_are_one_layout() -> None:
    both = struct_of(fuse.OutHeader, fuse.WriteOut)
    assert both.pack(24, 0, 7, 4096) == pack(fuse.OutHeader(24, 0, 7)) + pack(fuse.WriteOut(4096))


def test_seconds_before_1970_can_be_said() -> None:
    attr = fuse.Attr(1, 0, 0, -1, -(2**40), 0, 999999999, 0, 0, 0o100644, 1, 0, 0, 0, 4096, 0)
    assert unpack_from(fuse.Attr, pack(attr)) == attr


def test_a_value_that_does_not_fit_and_a_buffer_that_is_too_short_are_struct_errors() -> None:
    with pytest.raises(error):
        pack(fuse.WriteOut(1 << 32))
    with pytest.raises(error):
        unpack_from(fuse.FsyncIn, bytes(15))
