"""Origins: file handles as the kernel writes them, and what is not taken for one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overt.overlay.origin import UNKNOWN, Origin, decode, encode

UUID = bytes(range(16))
origins = st.builds(Origin, st.binary(min_size=16, max_size=16), st.integers(0, 255), st.binary(max_size=128))


def test_the_kernels_layout() -> None:
    """version 0, magic 0xfb, length, flags, type, UUID, handle."""
    written = bytes([0, 0xFB, 29, 0, 1]) + UUID + b"\x0d\0\0\0\x39\x30\0\0"
    assert encode(Origin(UUID, 1, written[21:])) == written
    assert decode(written) == Origin(UUID, 1, written[21:])


@given(origins)
def test_what_was_written_is_read(origin: Origin) -> None:
    assert decode(encode(origin)) == origin


@given(st.binary(max_size=80))
def test_anything_is_read_or_is_none(value: bytes) -> None:
    decode(value)


@pytest.mark.parametrize(
    "place, byte",
    [(0, 1), (1, 0xFA), (2, 30), (2, 20), (3, 1), (3, 8)],
    ids=["version", "magic", "longer than it is", "shorter than its head", "of the other byte order", "unknown flag"],
)
def test_what_is_not_understood_is_no_origin(place: int, byte: int) -> None:
    value = bytearray(encode(Origin(UUID, 1, bytes(8))))
    value[place] = byte
    assert decode(bytes(value)) is None


def test_what_does_not_fit_is_not_known() -> None:
    assert encode(Origin(UUID, 1, bytes(250))) == UNKNOWN
    assert encode(Origin(UUID, 256, bytes(8))) == UNKNOWN
    assert decode(UNKNOWN) is None
