"""Owners and modes that are kept in xattrs (xattr_permissions=1 and 2), by overt and by fuse-overlayfs."""

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .conftest import Place
from .test_views import as_user

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

KINDS = {1: "security.fuseoverlayfs.override_stat", 2: "user.containers.override_stat"}
OLD = "user.fuseoverlayfs.override_stat"
both = pytest.mark.parametrize("mode", KINDS, ids=["privileged", "user"])
with_fuse_overlayfs = pytest.mark.skipif(not shutil.which("fuse-overlayfs"), reason="no fuse-overlayfs")


@pytest.fixture(autouse=True)
def supported(place: Place) -> None:
    for name in (*KINDS.values(), OLD):
        try:
            os.setxattr(place.base, name, b"0:0:755")
            os.removexattr(place.base, name)
        except OSError as error:
            pytest.skip(f"this tmpfs has no {name}: {error}")


def seen(path: Path) -> tuple[str, int, int]:
    st = os.lstat(path)
    return oct(st.st_mode), st.st_uid, st.st_gid


@both
def test_the_layers_file_is_the_servers_and_the_xattr_says_whose_it_is(place: Place, mode: int) -> None:
    root = place.mount(f"xattr_permissions={mode}")
    (root / "file").write_text("text")
    os.chown(root / "file", 5, 6)
    os.chmod(root / "file", 0o4600)
    (root / "dir2").mkdir(0o700)
    os.chown(root / "dir2", 7, -1)
    for again in (False, True):
        if again:
            place.umount()
            place.mount(f"xattr_permissions={mode}")
        assert seen(root / "file") == ("0o104600", 5, 6)
        assert seen(root / "dir2") == ("0o40700", 7, 0)
    assert seen(place.upper / "file") == ("0o100755", 0, 0)
    assert seen(place.upper / "dir2") == ("0o40755", 0, 0)
    assert os.getxattr(place.upper / "file", KINDS[mode]) == b"5:6:4600"
    assert os.getxattr(place.upper / "dir2", KINDS[mode]) == b"7:0:700"
    assert not [name for name in os.listxattr(root / "file") if "override" in name]


@both
def test_permissions_are_the_ones_that_are_shown(place: Place, mode: int) -> None:
    root = place.mount(f"xattr_permissions={mode}")
    (root / "secret").write_text("text")
    os.chmod(root / "secret", 0o600)
    (root / "open").mkdir()
    os.chmod(root / "open", 0o3777)
    os.chown(root / "open", -1, 77)
    with pytest.raises(subprocess.CalledProcessError):
        as_user(1000, 1000, "cat", str(root / "secret"))
    as_user(1000, 1000, "sh", "-c", f"umask 027; echo x > {root}/open/mine; mkdir {root}/open/dir")
    assert seen(root / "open/mine") == ("0o100640", 1000, 77), "the group is the directory's"
    assert seen(root / "open/dir") == ("0o42750", 1000, 77)
    os.chmod(root / "open/mine", 0o4777)
    as_user(2000, 2000, "sh", "-c", f"echo more >> {root}/open/mine")
    assert seen(root / "open/mine")[0] == "0o100777", "a write takes setuid away"


@both
def test_a_copy_of_a_plain_layers_file_keeps_its_owner(place: Place, mode: int) -> None:
    os.chmod(place.lower / "of50", 0o640)
    os.setxattr(place.lower / "of50", "security.capability", bytes.fromhex("010000020004000000000000") + bytes(8))
    root = place.mount(f"xattr_permissions={mode}")
    expected, capability = seen(root / "of50"), os.getxattr(root / "of50", "security.capability")
    assert expected == ("0o100640", 50, 50)
    os.utime(root / "of50")
    os.utime(root / "dir")
    assert seen(root / "of50") == expected
    assert os.getxattr(root / "of50", "security.capability") == capability
    assert seen(place.upper / "of50") == ("0o100755", 0, 0)
    assert seen(root / "dir") == seen(place.lower / "dir")


@both
def test_what_cannot_carry_the_xattr_has_an_owner_of_its_own(place: Place, mode: int) -> None:
    root = place.mount(f"xattr_permissions={mode}")
    os.symlink("x", root / "link")
    os.mkfifo(root / "fifo", 0o600)
    for name in ("link", "fifo"):
        os.lchown(root / name, 8, 9)
        assert seen(root / name)[1:] == (8, 9)
        assert seen(place.upper / name) == seen(root / name)


def test_layers_of_each_kind_are_read_and_their_files_change_kind_when_they_are_copied(place: Place) -> None:
    for number, kind in KINDS.items():
        layer = place.base / f"layer{number}"
        layer.mkdir()
        (layer / f"file{number}").write_text("text")
        os.setxattr(layer, kind, b"0:0:755")
        os.setxattr(layer / f"file{number}", kind, b"%d:2:104711" % number)
    lowers = ":".join(f"layer{number}" for number in KINDS)
    options = f"lowerdir={lowers}:{place.lower},upperdir=upper,workdir=work,xattr_permissions=2"
    assert place.call("-o", options, place.merged).returncode == 0
    for number in KINDS:
        path = place.merged / f"file{number}"
        assert seen(path) == ("0o104711", number, 2)
        os.utime(path)
        assert seen(path) == ("0o104711", number, 2)
        assert sorted(os.listxattr(place.upper / path.name)) == sorted([KINDS[2], "trusted.overlay.origin"])


@pytest.mark.parametrize("value", [b"root", b"4294967295:0:644", b"9999999999:0:644"])
def test_what_says_nothing_is_an_error_and_not_a_guess(place: Place, value: bytes) -> None:
    os.setxattr(place.lower, KINDS[2], b"0:0:755")
    os.setxattr(place.lower / "of1", KINDS[2], value)
    root = place.mount("xattr_permissions=2")
    with pytest.raises(OSError, match="Input/output error"):
        os.stat(root / "of1")
    assert {"of1", "of50"} <= set(os.listdir(root)), "the others are listed all the same"
    assert seen(root / "of50") == ("0o100644", 50, 50)


def test_a_layer_whose_root_says_nothing_is_refused(place: Place) -> None:
    os.setxattr(place.lower, KINDS[2], b"everybody")
    done = place.call("-o", f"{place.options},xattr_permissions=2", place.merged)
    assert done.returncode == 1
    assert "override_stat that says nothing" in done.stderr


OF_LAYERS = (*KINDS.values(), OLD, "user.containers.override_security.capability", "user.fuseoverlayfs.opaque")


@both
@pytest.mark.parametrize("name", OF_LAYERS)
def test_nobody_makes_himself_an_owner(place: Place, mode: int, name: str) -> None:
    root = place.mount(f"xattr_permissions={mode}")
    for user in (0, 1000):
        file = root / f"of{user}"
        file.write_text("text")
        os.chown(file, user, user)
        before = seen(file)
        for words in (["-n", name, "-v", "0:0:4777"], ["-x", name]):
            with pytest.raises(subprocess.CalledProcessError) as failure:
                as_user(user, user, "setfattr", *words, str(file))
            assert "Operation not permitted" in failure.value.stderr
        place.umount()
        place.mount(f"xattr_permissions={mode}")
        assert seen(file) == before


@both
def test_what_means_nothing_in_a_plain_layer_means_nothing_in_its_files_copy(place: Place, mode: int) -> None:
    for name in OF_LAYERS:
        os.setxattr(place.lower / "of50", name, b"0:0:4777")
    root = place.mount(f"xattr_permissions={mode}")
    assert os.listxattr(root / "of50") == []
    os.utime(root / "of50")
    expected = {KINDS[mode]: b"50:50:644"}
    kept = {name: os.getxattr(place.upper / "of50", name) for name in os.listxattr(place.upper / "of50")}
    assert {name: value for name, value in kept.items() if name in OF_LAYERS} == expected
    assert seen(root / "of50") == ("0o100644", 50, 50)


def test_other_values_are_refused(place: Place) -> None:
    done = place.call("-o", f"{place.options},xattr_permissions=3", place.merged)
    assert done.returncode == 1
    assert "xattr_permissions=3: not 0, 1 or 2" in done.stderr


# Beside fuse-overlayfs


@contextmanager
def fuse_overlayfs(place: Place, extra: str) -> Iterator[Path]:
    subprocess.run(["fuse-overlayfs", "-o", f"{place.options},{extra}", place.merged], check=True, timeout=30)
    try:
        yield place.merged
    finally:
        place.umount()
        time.sleep(0.2)  # until the other server is gone


def everything(root: Path) -> dict[str, tuple[str, int, int]]:
    """What can carry the xattr; without the whiteout files that fuse-overlayfs leaves in an upper (docs/limits.md)."""
    found = {}
    for directory, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(directory, name)
            kind = stat.S_IFMT(os.lstat(path).st_mode)
            if kind in (stat.S_IFREG, stat.S_IFDIR) and not name.startswith(".wh."):
                found[str(path.relative_to(root))] = seen(path)
    return found


def operate(root: Path, name: str) -> None:
    (root / name).mkdir()
    (root / name / "file").write_text("text")
    os.chmod(root / name / "file", 0o640)
    os.chown(root / name / "file", 11, 12)
    os.chmod(root / "of1", 0o4751)
    os.chmod(root / "dir", 0o711)


@with_fuse_overlayfs
@both
def test_what_fuse_overlayfs_wrote_is_read_and_the_other_way_round(place: Place, mode: int) -> None:
    extra = f"xattr_permissions={mode}"
    with fuse_overlayfs(place, extra) as path:
        operate(path, "theirs")
        expected = everything(path)
    assert everything(place.mount(extra)) == expected
    operate(place.merged, "ours")
    expected = everything(place.merged)
    assert expected["ours/file"] == ("0o100640", 11, 12)
    place.umount()
    with fuse_overlayfs(place, extra) as path:
        assert everything(path) == expected


@with_fuse_overlayfs
@both
def test_a_lower_layer_that_fuse_overlayfs_wrote_is_read(place: Place, mode: int) -> None:
    extra = f"xattr_permissions={mode}"
    with fuse_overlayfs(place, extra) as path:
        operate(path, "theirs")
        expected = everything(path)
    options = f"lowerdir={place.upper}:{place.lower},xattr_permissions={mode}"
    assert place.call("-o", options, place.merged).returncode == 0
    assert everything(place.merged) == expected
