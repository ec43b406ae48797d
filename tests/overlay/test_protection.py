"""What the protattr mark says, and the words in which ioctls carry flags."""

import pytest

from overt.overlay.protection import APPEND, BOTH, IMMUTABLE, decode, encode, of_words, put_in_words


@pytest.mark.parametrize(("flags", "value"), [(0, b""), (APPEND, b"a"), (IMMUTABLE, b"i"), (BOTH, b"ai")])
def test_a_mark_is_read_as_it_is_written(flags: int, value: bytes) -> None:
    assert encode(flags | 0x80000 | 0x40) == value
    assert decode(value) == flags


def test_the_order_of_the_letters_does_not_matter() -> None:
    assert decode(b"ia") == decode(b"aia") == BOTH


@pytest.mark.parametrize("value", [b"x", b"ix", b"i\0", b"i" * 33])
def test_a_mark_with_anything_else_says_nothing(value: bytes) -> None:
    """As in ovl_check_protattr."""
    assert decode(value) == 0


def test_in_a_word_of_flags_the_two_are_replaced_and_the_others_kept() -> None:
    words = bytearray(b"\x50\x00\x08\x00")  # immutable, nodump, extents
    assert of_words(words, extended=False) == IMMUTABLE
    put_in_words(words, APPEND, extended=False)
    assert words == b"\x60\x00\x08\x00"
    put_in_words(words, 0, extended=False)
    assert words == b"\x40\x00\x08\x00"


def test_a_struct_fsxattr_has_them_elsewhere() -> None:
    words = bytearray(b"\x98\x00\x00\x00" + b"rest" * 6)  # immutable, append-only, nodump
    assert of_words(words, extended=True) == BOTH
    put_in_words(words, IMMUTABLE, extended=True)
    assert words == b"\x88\x00\x00\x00" + b"rest" * 6
    put_in_words(words, 0, extended=True)
    assert of_words(words, extended=True) == 0
