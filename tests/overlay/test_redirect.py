"""Redirects: which values are ones, where they lead, and how long one may become."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overt.overlay.redirect import LONGEST, absolute, checked, checked_name, onward

names = st.binary(min_size=1, max_size=8).filter(lambda name: b"/" not in name and b"\0" not in name)
plain = st.sampled_from([b"a", b"b", b"name"])


@pytest.mark.parametrize("value", [b"name", b"/name", b"/a/b/c", b"..", b"/.."])
def test_one_name_or_a_path_from_the_root(value: bytes) -> None:
    assert checked(value) == value


@pytest.mark.parametrize("value", [b"", b"/", b"//", b"/a/", b"/a//b", b"a/b", b"a/", b"../a", b"\0", b"/a/\0b"])
def test_anything_else_is_invalid(value: bytes) -> None:
    with pytest.raises(OSError) as raised:
        checked(value)
    assert raised.value.errno == errno.EINVAL


@pytest.mark.parametrize("name", [b"", b".", b".."])
def test_no_name_leads_out(name: bytes) -> None:
    with pytest.raises(OSError) as raised:
        checked_name(name)
    assert raised.value.errno == errno.EACCES
    assert checked_name(b"...") == b"..."


@pytest.mark.parametrize(
    "path, element, rest, value, expected",
    [
        (b"a", b"a", b"", b"b", b"b"),
        (b"a", b"a", b"", b"/x/y", b"/x/y"),
        (b"/a/b/c", b"b", b"/c", b"n", b"/a/n/c"),
        (b"/a/b/c", b"c", b"", b"n", b"/a/b/n"),
        (b"/a/b/c", b"a", b"/b/c", b"/x", b"/x/b/c"),
    ],
)
def test_what_follows_on_the_path_is_kept(
    path: bytes, element: bytes, rest: bytes, value: bytes, expected: bytes
) -> None:
    assert onward(path, element, rest, value) == expected


@given(st.lists(st.tuples(names, st.one_of(st.none(), names)), min_size=1, max_size=10))
def test_an_absolute_redirect_names_each_directory_by_its_own(steps: list[tuple[bytes, bytes | None]]) -> None:
    expected = b"".join(b"/" + (redirect or name) for name, redirect in reversed(steps))
    assert absolute(steps) == expected
    assert checked(expected) == expected


@given(st.lists(plain, min_size=1, max_size=4), plain, st.lists(plain, max_size=4))
def test_one_that_is_absolute_itself_ends_the_way_up(below: list[bytes], name: bytes, above: list[bytes]) -> None:
    steps = [*((part, None) for part in below), (name, b"/x/y"), *((part, None) for part in above)]
    assert absolute(steps) == b"/x/y" + b"".join(b"/" + part for part in reversed(below))


def test_too_long_is_none() -> None:
    assert absolute([(b"n" * (LONGEST - 1), None)]) == b"/" + b"n" * (LONGEST - 1)
    assert absolute([(b"n" * 128, None), (b"n" * 127, None)]) is None
