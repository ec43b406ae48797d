"""Owners and modes in an xattr, and the names of other xattrs beside them."""

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overt.overlay.owners import CONTAINERS, PRIVILEGED, USER, Owner, backing, decode, encode, shown, stored

ids = st.integers(0, 2**32 - 2)


@given(ids, ids, st.integers(0, 0o7777))
def test_what_is_written_is_read(uid: int, gid: int, mode: int) -> None:
    assert decode(encode(Owner(uid, gid, mode))) == Owner(uid, gid, mode)


@pytest.mark.parametrize(
    ("value", "owner"),
    [
        (b"0:0:40755", (0, 0, 0o755)), (b"5:6:104750", (5, 6, 0o4750)), (b"1:2:0700:dir", (1, 2, 0o700)),
        (b"1:2:0644:file", (1, 2, 0o644)), (b"0:0:555\0", (0, 0, 0o555)),
    ],
)  # fmt: skip
def test_what_others_write_is_read(value: bytes, owner: tuple[int, int, int]) -> None:
    assert decode(value) == owner


@pytest.mark.parametrize(
    "value", [b"", b"0", b"0:0", b"0:0:8", b"-1:0:644", b"0:0:644:char-1-3", b"0:0:644 ", b"a:b:c"]
)
def test_what_is_none_is_not_guessed(value: bytes) -> None:
    with pytest.raises(ValueError):
        decode(value)


def test_what_only_root_may_write_is_kept_under_another_name() -> None:
    name = b"security.capability"
    assert stored(CONTAINERS, name) == b"user.containers.override_security.capability"
    for kind in (PRIVILEGED, USER, None):
        assert stored(kind, name) == name
    assert shown(CONTAINERS, name) is None, "the layer's own is not the mount's"


@given(st.sampled_from([CONTAINERS, PRIVILEGED, USER, None]), st.sampled_from([b"user.a", b"security.b", b"trusted.c"]))
def test_a_name_comes_back(kind: bytes | None, name: bytes) -> None:
    assert shown(kind, stored(kind, name)) == name


@pytest.mark.parametrize("kind", [CONTAINERS, PRIVILEGED, USER, None])
def test_the_marks_themselves_are_not_shown(kind: bytes | None) -> None:
    assert [shown(kind, mark) for mark in (CONTAINERS, PRIVILEGED, USER)] == [None] * 3


def test_the_file_itself_gives_nothing_away() -> None:
    assert backing(0o4600) & (stat.S_ISUID | stat.S_ISGID) == 0
    assert backing(0) == 0o755
