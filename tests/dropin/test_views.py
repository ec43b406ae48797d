"""Owners, links and xattrs that are shown otherwise than the layers have them."""

import os
import stat
import struct
import subprocess
import time
from pathlib import Path

import pytest

from overt.overlay.view import OVERFLOW

from .conftest import Place

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

MAPPED = "uidmapping=0:1000:1:1:110000:20,gidmapping=0:2000:1:1:210000:20"
"""root is 1000 (its group 2000), 1 to 20 are 110000 and so on, 50 is nobody"""
_FALLBACK = [(1, 6, 0xFFFFFFFF), (4, 4, 0xFFFFFFFF), (16, 6, 0xFFFFFFFF), (32, 4, 0xFFFFFFFF)]


def owner(path: Path) -> tuple[int, int]:
    st = os.lstat(path)
    return st.st_uid, st.st_gid


def acl(*named: tuple[int, int, int]) -> bytes:
    """The bytes of an ACL with the usual entries and `named` ones: (tag, permissions, id)."""
    entries = sorted([*_FALLBACK, *named])
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def as_user(uid: int, gid: int, *command: str) -> str:
    words = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", *command]
    return subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout


def test_stat_shows_mapped_owners(place: Place) -> None:
    merged = place.mount(MAPPED)
    assert owner(merged / "of0") == (1000, 2000)
    assert owner(merged / "of1") == (110000, 210000)
    assert owner(merged / "of50") == (OVERFLOW, OVERFLOW)
    assert owner(merged) == (1000, 2000)
    listed = subprocess.run(["ls", "-ln", merged], capture_output=True, text=True, timeout=30, check=True).stdout
    assert {tuple(line.split()[2:4]) for line in listed.splitlines() if "of0" in line} == {("1000", "2000")}
    born = subprocess.run(["stat", "--printf=%W %u %g", merged / "of1"], capture_output=True, text=True, timeout=30)
    assert born.stdout.split()[1:] == ["110000", "210000"]  # by statx(2), which asks for the time of birth


def test_chown_and_new_files_store_what_is_meant(place: Place) -> None:
    merged = place.mount(MAPPED)
    os.chown(merged / "of0", 110004, 210006)
    assert owner(place.upper / "of0") == (5, 7)
    assert owner(merged / "of0") == (110004, 210006)
    os.chown(merged / "of1", -1, 2000)
    assert owner(place.upper / "of1") == (1, 0)
    os.chmod(merged, 0o777)
    for uid, gid, stored in ((1000, 2000, (0, 0)), (110002, 210002, (3, 3)), (0, 0, (OVERFLOW, OVERFLOW))):
        as_user(uid, gid, "touch", str(merged / f"file{uid}"))
        as_user(uid, gid, "mkdir", str(merged / f"dir{uid}"))
        as_user(uid, gid, "ln", "-s", "x", str(merged / f"link{uid}"))
        for kind in ("file", "dir", "link"):
            assert owner(place.upper / f"{kind}{uid}") == stored
            assert owner(merged / f"{kind}{uid}") == ((uid, gid) if uid else (OVERFLOW, OVERFLOW))


def test_permissions_are_those_of_the_shown_owner(place: Place) -> None:
    (place.lower / "of1").chmod(0o600)
    merged = place.mount(MAPPED)
    assert as_user(110000, 210000, "cat", str(merged / "of1")) == "lower\n"
    with pytest.raises(subprocess.CalledProcessError):
        as_user(1, 1, "cat", str(merged / "of1"))


def test_ids_in_acls_are_mapped_both_ways(place: Place) -> None:
    name = "system.posix_acl_access"
    os.setxattr(place.lower / "of0", name, acl((2, 4, 3), (8, 6, 4)))
    merged = place.mount(MAPPED)
    assert os.getxattr(merged / "of0", name) == acl((2, 4, 110002), (8, 6, 210003))
    os.setxattr(merged / "of1", name, acl((2, 4, 110009), (8, 6, 2000)))
    assert os.getxattr(place.upper / "of1", name) == acl((2, 4, 10), (8, 6, 0))
    assert os.getxattr(merged / "of1", name) == acl((2, 4, 110009), (8, 6, 2000))


def test_file_capabilities_are_for_the_mapped_root(place: Place) -> None:
    plain = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)

    def of(root: int) -> bytes:
        return struct.pack("<IIIIII", 0x03000001, 1 << 13, 0, 0, 0, root)

    name = "security.capability"
    os.setxattr(place.lower / "of0", name, plain)
    merged = place.mount(MAPPED)
    assert os.getxattr(merged / "of0", name) == of(1000)
    os.setxattr(merged / "of1", name, of(1000))
    assert os.getxattr(place.upper / "of1", name) == plain


def test_copy_up_keeps_what_the_layer_has(place: Place) -> None:
    merged = place.mount(MAPPED)
    with open(merged / "of1", "a") as file:
        file.write("more\n")
    assert owner(place.upper / "of1") == (1, 1)


def test_what_belongs_to_nobody_in_the_mount_is_nobodys_to_change(place: Place) -> None:
    """Least of all that of a user with the overflow id, who could make a program of another's setuid."""
    merged = place.mount(MAPPED)
    with pytest.raises(PermissionError):
        open(merged / "of50", "a").close()
    for words in (["chmod", "4755"], ["tee", "-a"]):
        with pytest.raises(subprocess.CalledProcessError):
            as_user(OVERFLOW, OVERFLOW, *words, str(merged / "of50"))
    assert not (place.upper / "of50").exists()


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ("squash_to_root", (0, 0)),
        ("squash_to_uid=7,squash_to_gid=8", (7, 8)),
        ("squash_to_root,squash_to_uid=7", (7, 0)),
    ],
)
def test_squashed_owners(place: Place, option: str, shown: tuple[int, int]) -> None:
    merged = place.mount(option)
    assert {owner(path) for path in [merged, *merged.iterdir()]} == {shown}
    os.chown(merged / "of1", 20, 21)
    assert owner(place.upper / "of1") == (20, 21)
    assert owner(merged / "of1") == shown


def test_static_nlink(place: Place) -> None:
    os.link(place.lower / "of0", place.lower / "again")
    (place.upper / "pure/below").mkdir(parents=True)
    merged = place.mount("static_nlink")
    assert os.stat(merged / "pure").st_nlink == 1
    assert os.stat(merged / "of0").st_nlink == 2
    place.umount()
    assert os.stat(place.mount() / "pure").st_nlink == os.stat(place.upper / "pure").st_nlink


def test_noacl(place: Place) -> None:
    name = "system.posix_acl_access"
    os.setxattr(place.lower / "of0", name, acl((2, 4, 3)))
    merged = place.mount("noacl")
    assert name not in os.listxattr(merged / "of0")
    with pytest.raises(OSError, match=r"not supported|No data"):
        os.getxattr(merged / "of0", name)
    for change in (
        lambda: os.setxattr(merged / "of1", name, acl((2, 4, 3))),
        lambda: os.removexattr(merged / "of0", name),
    ):
        with pytest.raises(OSError, match="not supported"):
            change()
    os.setxattr(merged / "of1", "user.other", b"x")
    assert os.getxattr(merged / "of1", "user.other") == b"x"


def test_noxattrs(place: Place) -> None:
    os.setxattr(place.lower / "of0", "user.mine", b"x")
    merged = place.mount("noxattrs=1")
    for call in (
        lambda: os.listxattr(merged / "of0"), lambda: os.getxattr(merged / "of0", "user.mine"),
        lambda: os.setxattr(merged / "of1", "user.mine", b"x"),
    ):  # fmt: skip
        with pytest.raises(OSError, match="not supported"):
            call()
    (merged / "of0").write_text("written\n")
    assert (place.upper / "of0").read_text() == "written\n"
    place.umount()
    assert os.getxattr(place.mount() / "of0", "user.mine") == b"x"


def test_timeout_shows_what_changed_behind_the_mount(place: Place) -> None:
    """Not what the layers are for; but who does it anyway can have it."""
    merged = place.mount("timeout=0.05")
    assert stat.S_IMODE(os.stat(merged / "of0").st_mode) == 0o644
    (place.lower / "of0").chmod(0o600)
    time.sleep(0.1)
    assert stat.S_IMODE(os.stat(merged / "of0").st_mode) == 0o600
    place.umount()
    merged = place.mount()
    assert stat.S_IMODE(os.stat(merged / "of0").st_mode) == 0o600
    (place.lower / "of0").chmod(0o640)
    time.sleep(0.1)
    assert stat.S_IMODE(os.stat(merged / "of0").st_mode) == 0o600
