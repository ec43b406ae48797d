"""Names and link counts of the index."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overt.overlay.index import beside_lower, beside_upper, entry_of, handle_of, union


@given(st.binary(min_size=21, max_size=127))
def test_an_entry_names_its_handle(handle: bytes) -> None:
    assert handle_of(entry_of(handle)) == handle


@pytest.mark.parametrize(
    "name", [b"", b"00" * 20, b"00 00" * 20, b"0" * 61, b"g0" * 30, b"\xff" * 60, b" " + b"00" * 30]
)
def test_what_is_no_entry_is_refused(name: bytes) -> None:
    with pytest.raises(ValueError):
        handle_of(name)


counts = st.integers(1, 60_000)


@given(union_=counts, lower=st.integers(2, 60_000), upper=counts)
def test_the_union_is_kept_whichever_side_it_is_counted_from(union_: int, lower: int, upper: int) -> None:
    assert union(beside_upper(union_ - upper), lower, upper) == union_
    assert union(beside_lower(union_ - lower), lower, upper) == union_


@pytest.mark.parametrize(
    "value", [None, b"", b"U", b"U1", b"V+1", b"U+1 ", b"U+1\0", b"U--1", b"L+", b"U-2", b"L-3", b"U+12345678901"]
)
def test_no_count_is_read_from_what_is_none(value: bytes | None) -> None:
    assert union(value, 3, 2) is None


def test_a_lower_file_with_one_name_has_no_union() -> None:
    assert union(b"U+1", 1, 1) is None
