"""What a layer's files say about other layers."""

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overt.overlay import marks

PREFIXES = (marks.PREFIX, marks.USER_PREFIX)


def test_a_whiteout_is_the_character_device_0_0_alone() -> None:
    assert marks.is_whiteout(stat.S_IFCHR | 0o600, 0)
    assert not marks.is_whiteout(stat.S_IFCHR, os.makedev(0, 1))
    assert not marks.is_whiteout(stat.S_IFBLK, 0)
    assert not marks.is_whiteout(stat.S_IFREG, 0)


@pytest.mark.parametrize("prefix", PREFIXES)
@given(rest=st.binary(max_size=20))
def test_what_looks_like_a_mark_is_stored_under_another_name_and_comes_back(prefix: bytes, rest: bytes) -> None:
    for name in (prefix + rest, b"user." + rest, prefix + b"overlay." + rest):
        stored = marks.stored(prefix, name)
        assert marks.shown(prefix, stored) == name
        assert not stored.startswith(prefix) or stored.startswith(prefix + b"overlay.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_marks_are_not_shown(prefix: bytes) -> None:
    for mark in (marks.OPAQUE, marks.WHITEOUT, b"origin", b"metacopy", b"overlay"):
        assert marks.shown(prefix, prefix + mark) is None


def test_what_a_copy_may_not_lose() -> None:
    assert marks.must_copy(b"security.capability")
    assert marks.must_copy(b"system.posix_acl_access")
    assert not marks.must_copy(b"user.note")
