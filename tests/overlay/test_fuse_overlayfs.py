"""Every option of fuse-overlayfs is taken, refused in words, or passed over; and the documentation has it."""

from pathlib import Path

import pytest

from overt.overlay import fuse_overlayfs, options
from overt.overlay.fuse_overlayfs import IGNORED, OWN, parse
from overt.overlay.options import OptionError

LAYERS = "lowerdir=/l,upperdir=/u,workdir=/w"
PAGE = (Path(__file__).parents[2] / "docs/fuse-overlayfs.md").read_text()

# Of the manual, the source and `fuse-overlayfs -h`, versions 1.10 to 1.16, with values that occur.
KNOWN = [
    "redirect_dir=off", 'context="u:r:t:s0:c1,c2"', "uidmapping=0:1000:1", "gidmapping=0:1000:1", "timeout=3.5",
    "threaded=1", "fsync=0", "fsync=1", "fast_ino=1", "writeback=0", "noxattrs=1", "plugins=", "xattr_permissions=0",
    "xattr_permissions=1", "xattr_permissions=2",
    "squash_to_root", "squash_to_uid=5", "squash_to_gid=5", "ino32_t", "static_nlink", "volatile", "noacl",
    "xino=off", "xino=auto", "xino=on", "clone_fd", "max_idle_threads=3", "max_idle_threads", "max_threads=4",
    "allow_other", "allow_root", "auto_unmount", "default_permissions", "debug", "fsname=x", "subtype=y", "dev",
    "nodev", "suid", "nosuid", "exec", "noexec", "atime", "noatime", "diratime", "nodiratime", "lazytime",
    "nolazytime", "relatime", "strictatime", "ro", "rw", "splice_read", "splice_write", "splice_move",
    "no_splice_read", "kernel_cache", "auto_cache", "max_write=4096", "max_read=4096", "max_readahead=4096",
    "max_background=9", "async_read", "sync_read", "congestion_threshold=3", "userxattr",
]  # fmt: skip


@pytest.mark.parametrize("option", KNOWN)
def test_it_is_taken(option: str) -> None:
    assert parse(f"{LAYERS},{option}").unknown == []


@pytest.mark.parametrize("option", KNOWN)
def test_it_is_documented(option: str) -> None:
    assert f"`{option.partition('=')[0]}" in PAGE


def test_the_page_has_both_tables() -> None:
    for name in [*OWN, *IGNORED]:
        assert f"`{name.removesuffix('=off')}" in PAGE
    for reason in set(IGNORED.values()):
        assert f"| {reason} |" in PAGE


@pytest.mark.parametrize("option", ["plugins=/a.so", "redirect_dir=maybe", "xattr_permissions=3"])
def test_what_cannot_be_is_refused(option: str) -> None:
    with pytest.raises(OptionError, match=option):
        parse(f"{LAYERS},{option}")


def test_what_is_unknown_is_passed_over() -> None:
    understood = parse(f"{LAYERS},shiny,colour=blue")
    assert understood.unknown == ["shiny", "colour=blue"]
    assert understood.options == parse(LAYERS).options


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("", "nodev"), ("dev", ""), ("dev,nodev", "nodev"), ("nosuid,suid", "nodev"), ("noexec", "nodev,noexec"),
        ("fsync=0", "nodev,volatile"), ("fsync=0,fsync=1", "nodev"), ("fsync=1,volatile", "nodev,volatile"),
        ("fsync=strict", "nodev,fsync=strict"), ("ro", "nodev,ro"), ("ro,rw", "nodev"), ("noacl", "nodev,noacl"),
    ],
)  # fmt: skip
def test_the_same_as_for_overt_mount(text: str, same: str) -> None:
    same = f"{same},whiteouts=oci"
    assert parse(f"{LAYERS},{text}").options == options.parse(f"{LAYERS},{same}")


def test_names_with_backslashes() -> None:
    understood = parse(r"lowerdir=/a\:b:/c,upperdir=/u\:v,workdir=/w\,x").options
    assert (understood.lower, understood.upper, understood.work) == (("/a:b", "/c"), "/u:v", "/w,x")


def test_without_an_upper_nothing_is_said_of_it() -> None:
    assert parse("lowerdir=/l:/l,workdir=/w,volatile").options.lower == ("/l",)


def test_the_later_of_two_counts() -> None:
    assert parse(f"{LAYERS},upperdir=/v").options.upper == "/v"
    assert fuse_overlayfs.parse("lowerdir=/a,lowerdir=/b").options.lower == ("/b",)
