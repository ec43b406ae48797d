"""Ids that are shown otherwise than they are stored."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overt.overlay import view
from overt.overlay.options import OptionError, parse
from overt.overlay.view import NO_ID, OVERFLOW, IdMap, Range, View, from_fields

LAYERS = "lowerdir=/l,upperdir=/u,workdir=/w"
PODMAN = (Range(0, 1000, 1), Range(1, 110000, 65536))


def test_nothing_asked_for_changes_nothing() -> None:
    assert parse(LAYERS).view == View()
    assert not View().changes
    plain = IdMap((), None)
    assert plain.shown(5) == plain.stored(5) == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uidmapping=0:1000:1:1:110000:65536", View(uids=PODMAN)),
        ("gidmapping=:0:1000:1:1:110000:65536", View(gids=PODMAN)),
        ("squash_to_root", View(squash_uid=0, squash_gid=0)),
        ("squash_to_root,squash_to_gid=7", View(squash_uid=0, squash_gid=7)),
        ("squash_to_uid=7", View(squash_uid=7)),
        ("static_nlink", View(static_nlink=True)),
        ("noacl", View(acl=False)),
        ("noxattrs=1", View(acl=False, xattrs=False)),
        ("noxattrs=0", View()),
        ("timeout=1.5", View(timeout=1.5)),
        ('context="a:b:c:s0:c1,c2"', View(context="a:b:c:s0:c1,c2")),
    ],
)
def test_understood(text: str, expected: View) -> None:
    assert parse(f"{LAYERS},{text}").view == expected
    assert expected.changes == (expected._replace(timeout=None, context=None) != View())


@pytest.mark.parametrize(
    "text",
    [
        "uidmapping=0:1", "uidmapping=a:1:1", "gidmapping=0:4294967296:1", "squash_to_uid=root", "squash_to_gid=-1",
        "squash_to_uid=4294967295", "timeout=-1", "timeout=nan", "timeout=x", "noxattrs=yes",
    ],
)  # fmt: skip
def test_refused_in_words_that_name_it(text: str) -> None:
    with pytest.raises(OptionError) as raised:
        parse(f"{LAYERS},{text}")
    assert str(raised.value).startswith(f"{text}: not ")


def test_ranges_both_ways() -> None:
    ids = IdMap(PODMAN, None)
    assert [ids.shown(number) for number in (0, 1, 65536, 65537, 1 << 20)] == [1000, 110000, 175535, NO_ID, NO_ID]
    assert [ids.stored(number) for number in (1000, 110000, 175535, 0)] == [0, 1, 65536, OVERFLOW]
    few = IdMap((Range(0, 1000, 1),), None)
    assert few.shown(few.stored(5)) == OVERFLOW, "what somebody without a range has made is his who has none"


def test_a_squashed_id_is_stored_as_it_comes() -> None:
    assert IdMap((), 7).shown(3) == 7
    assert IdMap((), 7).stored(3) == 3


@given(st.integers(0, 65536))
def test_what_has_a_range_comes_back(number: int) -> None:
    ids = IdMap(PODMAN, None)
    assert ids.stored(ids.shown(number)) == number


@given(st.binary(max_size=60))
def test_xattrs_of_any_bytes_are_no_trouble(value: bytes) -> None:
    ids = IdMap(PODMAN, None)
    for translate in (view.shown_capability, view.stored_capability):
        assert isinstance(translate(value, ids.shown), bytes)
    assert len(view.acl(value, ids.shown, ids.shown)) <= len(value)


def test_only_named_entries_of_an_acl_have_ids() -> None:
    def acl(user: int, group: int) -> bytes:
        entries = [(1, 6, 5), (2, 4, user), (4, 4, 5), (8, 4, group), (16, 6, 5), (32, 4, 5)]
        return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)

    assert view.acl(acl(3, 3), lambda uid: uid + 10, lambda gid: gid + 20) == acl(13, 23)


def test_a_view_survives_json() -> None:
    assert from_fields([[[0, 1000, 1], [1, 110000, 65536]], [], 7, None, True, False, True, 1.5, None]) == View(
        PODMAN, (), 7, None, True, False, True, 1.5
    )
