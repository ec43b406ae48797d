"""Names made and removed; what is left in the upper is what the kernel would have left there."""

import errno
import os
import stat
import time
from collections.abc import Callable
from typing import Any

import pytest

from .ground import Layers, describe, is_whiteout, link_open, marks, opaque, whiteout

Make = Callable[[Any], Any]

THINGS: dict[str, Make] = {
    "file": lambda path: path.write_text("new"),
    "directory": lambda path: path.mkdir(),
    "symlink": lambda path: path.symlink_to("new"),
    "fifo": os.mkfifo,
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
}


def removed(path: Any) -> None:
    (os.rmdir if path.is_dir() and not path.is_symlink() else os.unlink)(path)


@pytest.mark.parametrize("thing", THINGS)
def test_a_new_name_leaves_no_mark(layers: Layers, thing: str) -> None:
    root = layers.mount()
    THINGS[thing](root / "new")
    assert os.listdir(root) == ["new"]
    assert marks(layers.upper / "new") == set()
    removed(root / "new")
    assert os.listdir(layers.upper) == []


@pytest.mark.parametrize("old", THINGS)
@pytest.mark.parametrize("thing", THINGS)
def test_anything_can_take_the_place_of_what_was_removed(layers: Layers, old: str, thing: str) -> None:
    THINGS[old](layers.lower / "name")
    root = layers.mount()
    removed(root / "name")
    assert is_whiteout(layers.upper / "name")
    assert os.listdir(root) == []
    THINGS[thing](root / "name")
    assert os.listdir(root) == ["name"]
    assert marks(layers.upper / "name") == ({"trusted.overlay.opaque"} if thing == "directory" else set())
    expected = describe(root)
    removed(root / "name")
    assert is_whiteout(layers.upper / "name")
    THINGS[thing](root / "name")
    with layers.kernel() as path:
        assert describe(path) == expected


def test_a_new_directory_does_not_show_what_the_removed_one_had(layers: Layers) -> None:
    (layers.lower / "dir" / "sub").mkdir(parents=True)
    (layers.lower / "dir" / "sub" / "file").write_text("old")
    root = layers.mount()
    os.unlink(root / "dir" / "sub" / "file")
    os.rmdir(root / "dir" / "sub")
    os.rmdir(root / "dir")
    assert is_whiteout(layers.upper / "dir")
    os.makedirs(root / "dir" / "sub")
    assert os.listdir(root / "dir" / "sub") == []
    assert marks(layers.upper / "dir" / "sub") == set(), "nothing below shows it: no mark is needed"
    expected = describe(root)
    with layers.kernel() as path:
        assert describe(path) == expected


def test_mknod_of_a_whiteout_is_refused(layers: Layers) -> None:
    root = layers.mount()
    with pytest.raises(PermissionError):
        os.mknod(root / "name", stat.S_IFCHR, 0)
    os.mknod(root / "block", stat.S_IFBLK | 0o600, 0)
    assert os.listdir(root) == ["block"]


def test_names_that_are_there_are_not_made_again(layers: Layers) -> None:
    (layers.lower / "file").touch()
    (layers.lower / "dir").mkdir()
    root = layers.mount()
    for name in ("file", "dir"):
        for thing in THINGS:
            if thing != "file":
                with pytest.raises(FileExistsError):
                    THINGS[thing](root / name)
        with pytest.raises(FileExistsError):
            os.open(root / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        with pytest.raises(FileExistsError):
            os.link(root / "file", root / name)
    assert os.listdir(layers.upper) == [], "an attempt that fails copies nothing up"


def test_unlink_and_rmdir_say_what_is_wrong(layers: Layers) -> None:
    (layers.lower / "file").touch()
    (layers.lower / "dir" / "sub").mkdir(parents=True)
    root = layers.mount()
    for call, path, error in (
        (os.unlink, "dir", errno.EISDIR), (os.rmdir, "file", errno.ENOTDIR), (os.rmdir, "dir", errno.ENOTEMPTY),
        (os.unlink, "none", errno.ENOENT), (os.rmdir, "none", errno.ENOENT), (os.unlink, "file/x", errno.ENOTDIR),
        (os.rmdir, "dir/.", errno.EINVAL), (os.rmdir, "dir/sub/..", errno.ENOTEMPTY),
    ):  # fmt: skip
        with pytest.raises(OSError) as raised:
            call(f"{root}/{path}")
        assert raised.value.errno == error, path
    assert os.listdir(layers.upper) == []


@pytest.mark.parametrize("marked", [False, True], ids=["merged", "opaque"])
def test_rmdir_of_a_directory_with_whiteouts_inside(layers: Layers, marked: bool) -> None:
    (layers.lower / "dir").mkdir()
    (layers.upper / "dir").mkdir()
    for name in ("a", "b"):
        (layers.lower / "dir" / name).touch()
        whiteout(layers.upper / "dir" / name)
    if marked:
        opaque(layers.upper / "dir")
    root = layers.mount()
    fd = os.open(root / "dir", os.O_RDONLY)
    try:
        os.rmdir(root / "dir")
        assert os.listdir(fd) == []
        assert os.fstat(fd).st_nlink == 0
    finally:
        os.close(fd)
    assert is_whiteout(layers.upper / "dir")
    assert os.listdir(root) == []


def test_rmdir_of_a_directory_that_only_the_upper_has_leaves_nothing(layers: Layers) -> None:
    root = layers.mount()
    os.mkdir(root / "dir")
    (root / "dir" / "file").touch()
    os.unlink(root / "dir" / "file")
    os.rmdir(root / "dir")
    assert os.listdir(layers.upper) == []


def test_no_whiteout_over_what_a_layer_between_hides(new_layers: Callable[..., Layers]) -> None:
    layers = new_layers(lowers=2)
    (layers.lowers[1] / "name").touch()
    (layers.lowers[1] / "dir").mkdir()
    (layers.lowers[1] / "dir" / "name").touch()
    whiteout(layers.lowers[0] / "name")
    (layers.lowers[0] / "dir").mkdir()
    opaque(layers.lowers[0] / "dir")
    root = layers.mount()
    for path in (root / "name", root / "dir" / "name"):
        path.touch()
        path.unlink()
    assert sorted(os.listdir(layers.upper)) == ["dir"]
    assert os.listdir(layers.upper / "dir") == []


# Links


def test_a_link_of_a_lower_file_copies_it_up(layers: Layers) -> None:
    (layers.lower / "file").write_text("text")
    root = layers.mount()
    os.link(root / "file", root / "second")
    os.link(root / "second", root / "third")
    numbers = {os.stat(root / name).st_ino for name in ("file", "second", "third")}
    assert len(numbers) == 1
    assert os.stat(root / "second").st_nlink == 3
    with open(root / "third", "a") as file:
        file.write(" more")
    assert (root / "file").read_text() == "text more"
    os.unlink(root / "file")
    assert is_whiteout(layers.upper / "file")
    assert os.stat(root / "second").st_nlink == 2
    expected = describe(root)
    with layers.kernel() as path:
        assert describe(path) == expected


@pytest.mark.parametrize("where", ["upper", "lower"])
def test_a_link_over_a_whiteout(layers: Layers, where: str) -> None:
    (layers.lower / "gone").write_text("old")
    (getattr(layers, where) / "file").write_text("text")
    root = layers.mount()
    os.unlink(root / "gone")
    os.link(root / "file", root / "gone")
    assert (root / "gone").read_text() == "text"
    assert os.stat(root / "gone").st_nlink == 2
    assert os.stat(root / "gone").st_ino == os.stat(root / "file").st_ino


def test_links_stay_one_file_over_a_new_mount(layers: Layers) -> None:
    (layers.upper / "dir").mkdir()
    (layers.upper / "dir" / "one").write_text("text")
    os.link(layers.upper / "dir" / "one", layers.upper / "two")
    root = layers.mount()
    fd = os.open(root / "two", os.O_RDWR)
    try:
        os.unlink(root / "two")
        os.write(fd, b"TEXT")
        assert os.fstat(fd).st_nlink == 1
        assert (root / "dir" / "one").read_text() == "TEXT"
        os.unlink(root / "dir" / "one")
        assert os.fstat(fd).st_nlink == 0
    finally:
        os.close(fd)


def test_links_of_symlinks_devices_and_fifos(layers: Layers) -> None:
    for name in ("symlink", "fifo", "device"):
        THINGS[name](layers.lower / name)
    root = layers.mount()
    for name in ("symlink", "fifo", "device"):
        os.link(root / name, root / f"{name}2", follow_symlinks=False)
        assert os.lstat(root / name).st_nlink == 2
        assert os.lstat(root / name).st_ino == os.lstat(root / f"{name}2").st_ino
    with pytest.raises(PermissionError):
        os.link(root, root / "dir")


def test_a_nameless_file_gets_a_name_or_goes(layers: Layers) -> None:
    (layers.lower / "gone").write_text("old")
    root = layers.mount()
    os.unlink(root / "gone")
    fd = os.open(root, os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"text")
    assert os.fstat(fd).st_nlink == 0
    assert os.listdir(root) == []
    for name in ("gone", "second"):
        link_open(fd, root / name)
        assert (root / name).read_text() == "text"
    assert os.fstat(fd).st_nlink == 2
    os.close(fd)
    fd = os.open(root, os.O_TMPFILE | os.O_EXCL | os.O_WRONLY, 0o600)
    with pytest.raises(FileNotFoundError):
        link_open(fd, root / "never")
    os.close(fd)
    assert sorted(os.listdir(root)) == ["gone", "second"]


# Open and unlinked


@pytest.mark.parametrize("where", ["upper", "lower"])
def test_an_open_file_lives_on_without_a_name(data_layers: Layers, where: str) -> None:
    (getattr(data_layers, where) / "file").write_text("text")
    root = data_layers.mount()
    fd, again = os.open(root / "file", os.O_RDONLY), os.open(root / "file", os.O_RDONLY)
    os.unlink(root / "file")
    assert os.fstat(fd).st_nlink == 0
    (root / "file").write_text("another")
    assert os.pread(fd, 10, 0) == b"text"
    assert os.pread(again, 10, 0) == b"text"
    os.fchmod(fd, 0o600)
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
    assert os.fstat(fd).st_nlink == 0
    os.setxattr(fd, "user.x", b"1")
    assert os.getxattr(again, "user.x") == b"1"
    for number in (fd, again):
        os.close(number)
    assert (root / "file").read_text() == "another"
    assert os.listxattr(root / "file") == []


def test_an_open_file_without_a_name_can_be_written_and_cut(data_layers: Layers) -> None:
    (data_layers.lower / "file").write_text("text")
    root = data_layers.mount()
    fd = os.open(root / "file", os.O_RDWR)
    os.unlink(root / "file")
    os.pwrite(fd, b"more text", 0)
    os.ftruncate(fd, 4)
    assert os.pread(fd, 20, 0) == b"more"
    assert os.fstat(fd).st_size == 4
    os.posix_fallocate(fd, 0, 1 << 16)
    assert os.fstat(fd).st_size == 1 << 16
    os.close(fd)


def test_a_removed_lower_file_can_be_written_by_who_opens_it_again(data_layers: Layers) -> None:
    """It is copied up without a name."""
    (data_layers.lower / "file").write_text("text")
    root = data_layers.mount()
    path_fd = os.open(root / "file", os.O_PATH)
    os.unlink(root / "file")
    fd = os.open(f"/proc/self/fd/{path_fd}", os.O_RDWR)
    os.pwrite(fd, b"T", 0)
    assert os.pread(fd, 10, 0) == b"Text"
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)
    os.close(path_fd)
    assert (data_layers.lower / "file").read_text() == "text"


@pytest.mark.parametrize("features", ["", "index=on"])
def test_the_time_of_change_of_a_directory_in_which_a_copy_gets_its_name(
    new_layers: Callable[..., Layers], features: str
) -> None:
    """The copy-up puts the other times back, and cannot this one."""
    layers = new_layers(features=features)
    (layers.lower / "dir").mkdir()
    (layers.lower / "dir" / "file").write_text("text")
    os.link(layers.lower / "dir" / "file", layers.lower / "dir" / "second")
    root = layers.mount()
    os.chmod(root / "dir", 0o700)
    before = os.stat(root / "dir")
    time.sleep(0.02)
    os.chmod(root / "dir" / "file", 0o600)
    after = os.stat(root / "dir")
    assert after.st_ctime_ns == os.stat(layers.upper / "dir").st_ctime_ns > before.st_ctime_ns
    assert after.st_mtime_ns == before.st_mtime_ns


def test_times_of_directories_are_those_of_what_changed_them(layers: Layers) -> None:
    (layers.lower / "dir" / "sub").mkdir(parents=True)
    (layers.lower / "dir" / "sub" / "file").write_text("text")
    long_ago = 1_000_000_000
    for name in ("dir/sub/file", "dir/sub", "dir", "."):
        os.utime(layers.lower / name, (long_ago, long_ago))
    os.utime(layers.upper, (long_ago, long_ago))
    root = layers.mount()

    def when(name: str) -> float:
        return os.stat(root / name).st_mtime

    os.chmod(root / "dir" / "sub" / "file", 0o600)
    assert [when(name) for name in (".", "dir", "dir/sub", "dir/sub/file")] == [long_ago] * 4
    (root / "dir" / "sub" / "new").touch()
    assert when("dir/sub") > long_ago
    assert when("dir") == when(".") == long_ago
    os.utime(root / "dir" / "sub", (long_ago, long_ago))
    os.unlink(root / "dir" / "sub" / "file")
    assert when("dir/sub") > long_ago
    assert when("dir") == long_ago
