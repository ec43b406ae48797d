"""Layers as containers/storage unpacks them for a mount_program: whiteouts are files called .wh.NAME."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overt.host import mounts

from .conftest import Place

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

NAMES = ("a", "b", "c")
SAMPLES = 12


def test_a_removed_file_and_an_opaque_directory(place: Place) -> None:
    top = place.base / "top"
    (top / "dir").mkdir(parents=True)
    (top / ".wh.of1").touch()
    (place.lower / "dir/below").touch()
    (top / "dir/.wh..wh..opq").touch()
    (top / "dir/above").touch()
    done = place.call("-o", f"lowerdir={top}:{place.lower},upperdir=upper,workdir=work", place.merged)
    assert done.returncode == 0, done.stderr
    for name in ("of1", "dir/below", ".wh.of1", "dir/.wh..wh..opq"):
        assert not (place.merged / name).exists()
    assert sorted(os.listdir(place.merged)) == ["dir", "of0", "of50"]
    assert os.listdir(place.merged / "dir") == ["above"]
    # What is hidden already needs no whiteout of ours.
    (place.merged / "of1").touch()
    (place.merged / "of1").unlink()
    assert not os.path.lexists(place.upper / "of1")
    os.unlink(place.merged / "dir/above")
    os.rmdir(place.merged / "dir")
    assert sorted(os.listdir(place.merged)) == ["of0", "of50"]


def test_a_name_beside_its_own_whiteout_is_there_and_hides_what_is_below(place: Place) -> None:
    top = place.base / "top"
    (top / "dir").mkdir(parents=True)
    for name in (".wh.dir", ".wh.of1"):
        (top / name).touch()
    (top / "of1").write_text("of the same layer")
    (top / "dir/above").touch()
    (place.lower / "dir/below").touch()
    done = place.call("-o", f"lowerdir={top}:{place.lower},upperdir=upper,workdir=work", place.merged)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(place.merged)) == ["dir", "of0", "of1", "of50"]
    assert (place.merged / "of1").read_text() == "of the same layer"
    assert os.listdir(place.merged / "dir") == ["above"]
    assert not (place.merged / "dir/below").exists()
    # It is of a lower layer, so that to remove it takes a whiteout.
    for name in ("of1", "dir/above"):
        (place.merged / name).unlink()
    (place.merged / "dir").rmdir()
    assert sorted(os.listdir(place.merged)) == ["of0", "of50"]
    assert sorted(os.listdir(place.upper)) == ["dir", "of1"]
    (place.merged / "dir").mkdir()
    assert os.listdir(place.merged / "dir") == []


def test_what_fuse_overlayfs_has_marked_opaque(place: Place) -> None:
    top = place.base / "top"
    (top / "dir").mkdir(parents=True)
    os.setxattr(top / "dir", "user.fuseoverlayfs.opaque", b"y")
    (place.lower / "dir/below").touch()
    assert place.call("-o", f"lowerdir={top}:{place.lower}", place.merged).returncode == 0
    assert os.listdir(place.merged / "dir") == []


def test_the_copy_of_what_fuse_overlayfs_has_marked_opaque_hides_nothing_as_a_layer(place: Place) -> None:
    middle = place.base / "middle"
    (middle / "dir").mkdir(parents=True)
    (middle / "dir/file").touch()
    os.setxattr(middle / "dir", "user.fuseoverlayfs.opaque", b"y")
    words = f"lowerdir={middle}:{place.lower},upperdir=upper,workdir=work"
    assert place.call("-o", words, place.merged).returncode == 0
    assert os.listxattr(place.merged / "dir") == []
    with pytest.raises(PermissionError):
        os.setxattr(place.merged, "user.fuseoverlayfs.opaque", b"y")
    (place.merged / "dir/new").touch()
    place.umount()
    lower = f"lowerdir={place.upper}:{middle}:{place.lower}"
    assert place.call("-o", lower, place.merged).returncode == 0
    assert sorted(os.listdir(place.merged / "dir")) == ["file", "new"]


def test_only_where_it_is_asked_for(place: Place) -> None:
    (place.lower / ".wh.of1").touch()
    from overt.cli.mount import command

    assert command.main(["-o", f"lowerdir={place.lower}", str(place.merged)], standalone_mode=False) == 0
    assert {".wh.of1", "of1"} <= set(os.listdir(place.merged))


# Beside kernel overlayfs: the same layers in both forms


def make(oci: Path, plain: Path, dice: random.Random, depth: int = 0) -> None:
    """One directory of a layer, at random, once with OCI whiteouts and once with overlayfs's."""
    for directory in (oci, plain):
        directory.mkdir()
    if depth and dice.random() < 0.25:
        (oci / ".wh..wh..opq").touch()
        os.setxattr(plain, "trusted.overlay.opaque", b"y")
    for name in NAMES:
        kind = dice.choice(("nothing", "file", "directory", "whiteout"))
        if kind == "file":
            if dice.random() < 0.2:
                (oci / f".wh.{name}").touch()
            (oci / name).write_text(str(oci.parent))
            (plain / name).write_text(str(oci.parent))
        elif kind == "whiteout":
            (oci / f".wh.{name}").touch()
            os.mknod(plain / name, 0o020000, 0)
        elif kind == "directory" and depth < 2 and dice.random() < 0.2:
            # Beside its whiteout in one layer: it is there, and nothing shows through (docs/decisions/0015).
            make(oci / name, plain / name, dice, depth + 1)
            (oci / f".wh.{name}").touch()
            os.setxattr(plain / name, "trusted.overlay.opaque", b"y")
        elif kind == "directory" and depth < 2:
            make(oci / name, plain / name, dice, depth + 1)


def walk(root: Path, sight: Path, *, list_too: bool) -> dict[str, object]:
    """What is there, found by names; `list_too`: and then by listing, which has to agree.

    Kernel overlayfs lists the whiteouts of a directory that one layer alone has.
    """
    seen: dict[str, object] = {}
    for name in NAMES:
        path = root / name
        key = str(path.relative_to(sight))
        if path.is_dir():
            seen[key] = "directory"
            seen |= walk(path, sight, list_too=list_too)
        elif path.exists():
            seen[key] = path.read_text()
    if list_too:
        assert sorted(os.listdir(root)) == sorted(Path(key).name for key in seen if (sight / key).parent == root)
    return seen


@contextmanager
def kernel(layers: list[Path], target: Path) -> Iterator[Path]:
    fd = mounts.new_mount("overlay", [("lowerdir", ":".join(map(str, layers)))])
    target.mkdir()
    mounts.attach(fd, target)
    os.close(fd)
    try:
        yield target
    finally:
        mounts.umount(target)


@pytest.mark.parametrize("seed", range(SAMPLES))
def test_the_same_tree_as_from_whiteouts_of_overlayfs(place: Place, seed: int) -> None:
    dice = random.Random(seed)
    for index in range(4):
        (place.base / f"{index}").mkdir()
        make(place.base / f"{index}/oci", place.base / f"{index}/plain", dice)
    names = ":".join(f"{index}/oci" for index in range(4))
    assert place.call("-o", f"lowerdir={names},upperdir=upper,workdir=work", place.merged).returncode == 0
    with kernel([place.base / f"{index}/plain" for index in range(4)], place.base / "kernel") as theirs:
        assert walk(place.merged, place.merged, list_too=True) == walk(theirs, theirs, list_too=False)
