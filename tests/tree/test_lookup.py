"""What is seen of a merged tree: names, attributes, layers, marks."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from overt.host.files import statx
from overt.wire import fuse
from overt.wire.record import unpack_from

from .ground import Layers, describe, opaque, whiteout


def test_uppermost_layer_wins_and_directories_are_merged(new_layers: Callable[..., Layers]) -> None:
    layers = new_layers(lowers=3)
    for number, layer in enumerate([layers.upper, *layers.lowers]):
        (layer / "dir").mkdir()
        (layer / "dir" / "same").write_text(f"layer {number}")
        (layer / "dir" / f"own{number}").write_text(f"own {number}")
    root = layers.mount()
    assert sorted(os.listdir(root / "dir")) == ["own0", "own1", "own2", "own3", "same"]
    assert (root / "dir" / "same").read_text() == "layer 0"
    assert (root / "dir" / "own3").read_text() == "own 3"


def test_a_file_over_a_directory_ends_the_merging(new_layers: Callable[..., Layers]) -> None:
    layers = new_layers(lowers=3)
    (layers.lowers[0] / "a").mkdir()
    (layers.lowers[0] / "a" / "top").touch()
    (layers.lowers[1] / "a").write_text("in between")
    (layers.lowers[2] / "a").mkdir()
    (layers.lowers[2] / "a" / "bottom").touch()
    root = layers.mount()
    assert os.listdir(root / "a") == ["top"]


def test_whiteouts_and_opaque_directories_hide(new_layers: Callable[..., Layers]) -> None:
    layers = new_layers(lowers=2)
    top, bottom = layers.lowers
    for name in ("gone", "dir/gone", "opaque/gone", "opaque/deep/gone", "dir/seen"):
        (bottom / name).parent.mkdir(parents=True, exist_ok=True)
        (bottom / name).write_text(name)
    (top / "dir").mkdir()
    (top / "opaque").mkdir()
    opaque(top / "opaque")
    whiteout(top / "gone")
    whiteout(top / "dir" / "gone")
    root = layers.mount()
    assert sorted(os.listdir(root)) == ["dir", "opaque"]
    assert os.listdir(root / "dir") == ["seen"]
    assert os.listdir(root / "opaque") == []
    for name in ("gone", "dir/gone", "opaque/gone", "opaque/deep"):
        assert not os.path.lexists(root / name)


def test_whiteouts_by_xattr_in_a_lower_layer(new_layers: Callable[..., Layers]) -> None:
    layers = new_layers(lowers=2)
    top, bottom = layers.lowers
    for name in ("dir/gone", "dir/empty", "dir/seen"):
        (bottom / name).parent.mkdir(parents=True, exist_ok=True)
        (bottom / name).write_text(name)
    (top / "dir").mkdir()
    for directory in (top, top / "dir"):
        opaque(directory, b"x")
    (top / "dir" / "gone").touch()
    os.setxattr(top / "dir" / "gone", "trusted.overlay.whiteout", b"")
    (top / "dir" / "empty").touch()
    root = layers.mount()
    assert sorted(os.listdir(root / "dir")) == ["empty", "seen"]
    assert (root / "dir" / "empty").read_text() == ""
    with pytest.raises(FileNotFoundError):
        os.lstat(root / "dir" / "gone")
    (root / "dir" / "gone").write_text("new")
    expected = describe(root)
    with layers.kernel() as path:
        assert describe(path) == expected


def test_twelve_lower_layers(new_layers: Callable[..., Layers]) -> None:
    layers = new_layers(lowers=12)
    for number, layer in enumerate(layers.lowers):
        (layer / "dir" / f"d{number}").mkdir(parents=True)
        (layer / "dir" / "same").write_text(str(number))
        (layer / f"only{number}").write_text(str(number))
    whiteout(layers.lowers[3] / "only7")
    root = layers.mount()
    assert (root / "dir" / "same").read_text() == "0"
    assert len(os.listdir(root / "dir")) == 13
    assert sorted(os.listdir(root)) == sorted(["dir", *(f"only{number}" for number in range(12) if number != 7)])
    os.unlink(root / "dir" / "same")
    assert not (root / "dir" / "same").exists()
    os.rmdir(root / "dir" / "d11")
    expected = describe(root)
    with layers.kernel() as path:
        assert describe(path) == expected


def test_stat_shows_the_layers_file(layers: Layers) -> None:
    file = layers.lower / "file"
    file.write_bytes(b"x" * 5000)
    os.chown(file, 12, 34)
    os.chmod(file, 0o640)
    os.utime(file, ns=(1_234_567_890_123_456_789, 1_034_567_890_987_654_321))
    os.link(file, layers.lower / "other")
    root = layers.mount()
    theirs, ours = os.stat(file), os.stat(root / "file")
    for field in (
        "st_mode",
        "st_uid",
        "st_gid",
        "st_size",
        "st_nlink",
        "st_mtime_ns",
        "st_atime_ns",
        "st_ctime_ns",
        "st_blocks",
    ):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert os.stat(root / "file").st_dev == os.stat(root).st_dev


def test_statx_knows_the_time_of_birth(layers: Layers) -> None:
    (layers.lower / "file").touch()
    root = layers.mount()
    born = [
        unpack_from(fuse.Statx, statx(-100, os.fsencode(place / "file"), 0, 0xFFF)).btime.tv_sec
        for place in (layers.lower, root)
    ]
    assert born[0] == born[1] > 0


def test_inode_numbers_survive_copy_up_and_a_new_mount(new_layers: Callable[..., Layers]) -> None:
    layers = new_layers(lowers=2)
    for layer in layers.lowers:
        (layer / "dir" / "sub").mkdir(parents=True)
    (layers.lower / "dir" / "file").write_text("text")
    root = layers.mount()
    names = (".", "dir", "dir/sub", "dir/file")
    before = [os.stat(root / name).st_ino for name in names]
    (root / "dir" / "sub" / "new").touch()
    with open(root / "dir" / "file", "a") as file:
        file.write("more")
    assert [os.stat(root / name).st_ino for name in names] == before
    listed = {entry.name: entry.inode() for entry in os.scandir(root / "dir")}
    assert listed == {"sub": before[2], "file": before[3]}
    layers.umount()
    layers.mount()
    assert [os.stat(root / name).st_ino for name in names[:3]] == before[:3]
    listed = {entry.name: entry.inode() for entry in os.scandir(root / "dir")}
    assert listed == {name: os.stat(root / "dir" / name).st_ino for name in ("sub", "file")}


def test_other_names_of_a_copied_up_file_are_another_file(layers: Layers) -> None:
    (layers.lower / "one").write_text("text")
    os.link(layers.lower / "one", layers.lower / "two")
    root = layers.mount()
    with open(root / "one", "a") as file:
        file.write("more")
    one, two = os.stat(root / "one"), os.stat(root / "two")
    assert (one.st_size, two.st_size) == (8, 4)
    assert (one.st_nlink, two.st_nlink) == (1, 2)
    assert one.st_ino != two.st_ino


def test_a_number_used_again_is_another_file(layers: Layers) -> None:
    """ext4 gives a new file the inode number of one that was just removed."""
    for number in range(20):
        (layers.lower / f"file{number}").write_text("text")
    root = layers.mount()
    lower = {os.stat(root / f"file{number}").st_ino for number in range(20)}
    for number in range(20):
        os.chmod(root / f"file{number}", 0o600)
        os.unlink(root / f"file{number}")
        (root / f"new{number}").touch()
    assert not lower & {os.stat(root / f"new{number}").st_ino for number in range(20)}


def test_statfs_is_the_uppers(layers: Layers) -> None:
    root = layers.mount()
    ours, theirs = os.statvfs(root), os.statvfs(layers.upper)
    assert (ours.f_blocks, ours.f_files, ours.f_bsize, ours.f_namemax) == (
        theirs.f_blocks, theirs.f_files, theirs.f_bsize, theirs.f_namemax,
    )  # fmt: skip


@pytest.mark.parametrize("listed", [False, True])
def test_names_of_255_bytes_work_and_longer_ones_are_too_long(layers: Layers, listed: bool) -> None:
    long, longer = "n" * 255, "n" * 256
    (layers.lower / long).write_text("text")
    root = layers.mount()
    if listed:  # what is listed is not looked for in the layers
        os.listdir(root)
    assert (root / long).read_text() == "text"
    os.rename(root / long, root / long.upper())
    os.mkdir(root / long)
    os.rmdir(root / long)
    calls: list[Callable[[], object]] = [
        lambda: os.stat(root / longer), lambda: os.mkdir(root / longer), lambda: os.unlink(root / longer),
        lambda: os.symlink("x", root / longer), lambda: (root / longer).touch(), lambda: os.mknod(root / longer),
        lambda: os.rename(root / long.upper(), root / longer), lambda: os.link(root / long.upper(), root / longer),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(OSError) as raised:
            call()
        assert raised.value.errno == errno.ENAMETOOLONG


def test_paths_of_the_greatest_length_work(layers: Layers) -> None:
    """PATH_MAX counts the terminating NUL; the server never sees a path at all."""
    root = layers.mount()
    here = os.getcwd()
    os.chdir(root)
    try:
        parts = ["d" * 254] * 16
        path = "/".join(parts)
        os.makedirs(path)
        name = path + "/" + "f" * (4095 - len(path) - 1)
        assert len(name) == 4095
        Path(name).write_text("deep")
        assert Path(name).read_text() == "deep"
        os.unlink(name)
        with pytest.raises(OSError) as raised:
            os.stat(name + "f")
        assert raised.value.errno == errno.ENAMETOOLONG
    finally:
        os.chdir(here)


def test_trees_deeper_than_any_recursion(layers: Layers) -> None:
    depth = 1500
    here = os.getcwd()
    os.chdir(layers.lower)
    try:
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        Path("file").write_text("deep")
        os.chdir(layers.mount())
        for _ in range(depth):
            os.chdir("d")
        assert Path("file").read_text() == "deep"
        with open("file", "a") as file:  # all the directories above are copied up
            file.write("er")
        assert os.stat(".").st_nlink >= 1
    finally:
        os.chdir(here)
    layers.umount()
    file_in_upper = "d/" * 1000
    fd = os.open(layers.upper / file_in_upper, os.O_PATH)
    try:
        path = f"/proc/self/fd/{fd}/{'d/' * 500}file"
        assert Path(path).read_text() == "deeper"
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", [b"\xff\xfe", b"caf\xe9", b"\xed\xa0\x80", b"new\nline", b" ", b"-", b"%s", b"\x01"])
def test_names_are_bytes(layers: Layers, name: bytes) -> None:
    with open(os.path.join(os.fsencode(layers.lower), name), "w") as file:
        file.write("lower")
    root = os.fsencode(layers.mount())
    path = os.path.join(root, name)
    assert os.listdir(root) == [name]
    with open(path, "a") as file:
        file.write(" upper")
    os.rename(path, path + b"\xff")
    os.symlink(name, path)
    assert os.readlink(path) == name
    assert sorted(os.listdir(root)) == sorted([name, name + b"\xff"])
    os.unlink(path)
    with open(path + b"\xff") as file:
        assert file.read() == "lower upper"


def test_symlinks_are_read_and_of_any_length(layers: Layers) -> None:
    target = "t/" * 2000
    os.symlink(target, layers.lower / "lower")
    root = layers.mount()
    os.symlink("../" + target, root / "upper")
    assert os.readlink(root / "lower") == target
    assert os.readlink(root / "upper") == "../" + target
    assert os.lstat(root / "lower").st_size == len(target)
    os.lchown(root / "lower", 5, 5)
    assert os.readlink(layers.upper / "lower") == target


def test_a_read_only_overlay_of_lower_layers(new_layers: Callable[..., Layers]) -> None:
    layers = new_layers(lowers=2)
    for number, layer in enumerate(layers.lowers):
        (layer / "dir").mkdir()
        (layer / "dir" / f"file{number}").write_text("text")
    layers.client.mount(str(layers.path), f"lowerdir={layers.lowers[0]}:{layers.lowers[1]}")
    root = layers.path
    assert sorted(os.listdir(root / "dir")) == ["file0", "file1"]
    for call in (lambda: (root / "new").touch(), lambda: os.chmod(root / "dir" / "file0", 0o600)):
        with pytest.raises(OSError) as raised:
            call()
        assert raised.value.errno == errno.EROFS
    assert stat.S_ISDIR(os.stat(root).st_mode)
