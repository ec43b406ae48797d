"""rename(2) and renameat2(2)."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from overt.host.files import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, renameat2

from .ground import Layers, describe, is_whiteout, marks


def rename(old: Path, new: Path, flags: int = 0) -> None:
    renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags)


def fails(error: int, old: Path, new: Path, flags: int = 0) -> None:
    with pytest.raises(OSError) as raised:
        rename(old, new, flags)
    assert raised.value.errno == error


def as_in_the_kernel(layers: Layers) -> None:
    """What overt shows, the kernel shows too."""
    expected = describe(layers.path)
    with layers.kernel() as path:
        assert describe(path) == expected


@pytest.fixture
def populated(layers: Layers) -> Layers:
    """Of each thing one that the lower layer has and one that the upper has."""
    for number, layer in enumerate((layers.lower, layers.upper)):
        where = ("lower", "upper")[number]
        (layer / f"{where}-file").write_text(where)
        (layer / f"{where}-dir").mkdir()
        (layer / f"{where}-dir" / "inside").write_text(where)
        (layer / f"{where}-empty").mkdir()
        (layer / "both").mkdir()
        (layer / "both" / where).write_text(where)
        os.symlink(where, layer / f"{where}-link")
    layers.mount()
    return layers


@pytest.mark.parametrize("where", ["lower", "upper"])
@pytest.mark.parametrize("target", ["new", "lower-file", "upper-file", "both/new", "lower-dir/inside", "upper-link"])
def test_a_file_moves(populated: Layers, where: str, target: str) -> None:
    root = populated.path
    os.rename(root / f"{where}-link", root / "moved-link")
    os.rename(root / f"{where}-file", root / target)
    if target != f"{where}-file":
        assert not os.path.lexists(root / f"{where}-file")
        assert os.path.lexists(populated.upper / f"{where}-file") == (where == "lower"), (
            "a whiteout where one is needed"
        )
    assert (root / target).read_text() == where
    assert os.readlink(root / "moved-link") == where
    as_in_the_kernel(populated)


@pytest.mark.parametrize("target", ["new", "upper-empty", "lower-empty", "both/new", "upper-dir/new"])
def test_a_directory_of_the_upper_moves(populated: Layers, target: str) -> None:
    root = populated.path
    os.rename(root / "upper-dir", root / target.replace("upper-dir", "both"))
    place = target.replace("upper-dir", "both")
    assert os.listdir(root / place) == ["inside"]
    assert marks(populated.upper / place) == ({"trusted.overlay.opaque"} if target == "lower-empty" else set())
    as_in_the_kernel(populated)


@pytest.mark.parametrize("flags", [0, RENAME_NOREPLACE, RENAME_EXCHANGE])
@pytest.mark.parametrize("name", ["lower-dir", "lower-empty", "both"])
def test_a_directory_with_a_lower_part_does_not_move(populated: Layers, name: str, flags: int) -> None:
    root = populated.path
    before = describe(root)
    fails(errno.EXDEV, root / name, root / ("upper-dir" if flags == RENAME_EXCHANGE else "new"), flags)
    if flags == RENAME_EXCHANGE:
        fails(errno.EXDEV, root / "upper-dir", root / name, flags)
    assert describe(root) == before


def test_a_directory_copied_file_by_file_does_move(populated: Layers) -> None:
    """What mv does after EXDEV."""
    root = populated.path
    os.mkdir(root / "new")
    os.rename(root / "both" / "lower", root / "new" / "lower")
    os.rename(root / "both" / "upper", root / "new" / "upper")
    os.rmdir(root / "both")
    os.rename(root / "new", root / "both")
    assert sorted(os.listdir(root / "both")) == ["lower", "upper"]
    as_in_the_kernel(populated)


def test_over_whiteouts(populated: Layers) -> None:
    root = populated.path
    for name in ("lower-file", "lower-link"):
        os.unlink(root / name)
    os.rmdir(root / "lower-empty")
    os.rename(root / "upper-dir", root / "lower-file")
    os.rename(root / "upper-file", root / "lower-empty")
    os.rename(root / "upper-empty", root / "lower-link")
    assert os.listdir(root / "lower-file") == ["inside"]
    assert (root / "lower-empty").read_text() == "upper"
    assert not (set(os.listdir(populated.upper)) & {"upper-dir", "upper-file", "upper-empty"})
    as_in_the_kernel(populated)


def test_from_one_whiteouts_place_to_another(populated: Layers) -> None:
    """The old name needs a whiteout, and the new one has one: files and directories."""
    root = populated.path
    for name in ("lower-file", "lower-link"):
        os.unlink(root / name)
    os.mkdir(root / "lower-file")
    (root / "lower-file" / "in").touch()
    os.rename(root / "lower-file", root / "lower-link")
    assert is_whiteout(populated.upper / "lower-file")
    assert os.listdir(root / "lower-link") == ["in"]
    (root / "lower-file").write_text("again")
    os.unlink(root / "lower-link" / "in")
    os.rmdir(root / "lower-link")
    os.rename(root / "lower-file", root / "lower-link")
    assert is_whiteout(populated.upper / "lower-file")
    assert (root / "lower-link").read_text() == "again"
    as_in_the_kernel(populated)


def test_a_directory_over_one_that_holds_only_whiteouts(populated: Layers) -> None:
    root = populated.path
    os.unlink(root / "both" / "lower")
    os.unlink(root / "both" / "upper")
    os.rename(root / "upper-dir", root / "both")
    assert os.listdir(root / "both") == ["inside"]
    as_in_the_kernel(populated)


def test_over_one_that_holds_only_whiteouts_fails_cleanly(populated: Layers) -> None:
    """The directory is the same one afterwards, when what comes after the emptying cannot be done."""
    root = populated.path
    os.unlink(root / "both" / "lower")
    os.unlink(root / "both" / "upper")
    os.chmod(root / "both", 0o1750)
    os.chown(root / "both", 5, 6)
    fails(errno.ENOTDIR, root / "upper-dir", root / "upper-file")
    fails(errno.EISDIR, root / "upper-file", root / "both")
    st = os.stat(root / "both")
    assert (st.st_mode & 0o7777, st.st_uid, st.st_gid) == (0o1750, 5, 6)
    as_in_the_kernel(populated)


def test_errors(populated: Layers) -> None:
    root = populated.path
    before = describe(root)
    fails(errno.ENOENT, root / "none", root / "new")
    fails(errno.ENOENT, root / "upper-file", root / "none" / "new")
    fails(errno.ENOTEMPTY, root / "upper-empty", root / "both")
    fails(errno.ENOTEMPTY, root / "upper-empty", root / "upper-dir")
    fails(errno.ENOTDIR, root / "upper-dir", root / "lower-file")
    fails(errno.EISDIR, root / "lower-file", root / "upper-empty")
    fails(errno.EINVAL, root / "upper-dir", root / "upper-dir" / "below")
    fails(errno.EEXIST, root / "upper-file", root / "lower-file", RENAME_NOREPLACE)
    fails(errno.EEXIST, root / "lower-file", root / "lower-file", RENAME_NOREPLACE)
    fails(errno.ENOENT, root / "upper-file", root / "new", RENAME_EXCHANGE)
    fails(errno.EINVAL, root / "upper-file", root / "new", RENAME_NOREPLACE | RENAME_EXCHANGE)
    fails(errno.EINVAL, root / "upper-file", root / "new", RENAME_WHITEOUT)
    assert describe(root) == before


def test_noreplace(populated: Layers) -> None:
    root = populated.path
    rename(root / "lower-file", root / "new", RENAME_NOREPLACE)
    os.unlink(root / "lower-link")
    rename(root / "upper-file", root / "lower-link", RENAME_NOREPLACE)
    assert (root / "lower-link").read_text() == "upper"
    as_in_the_kernel(populated)


@pytest.mark.parametrize(
    "one, other",
    [
        ("lower-file", "upper-file"), ("lower-file", "lower-link"), ("upper-dir", "upper-file"),
        ("upper-dir", "lower-file"),
        ("upper-dir", "upper-empty"), ("upper-empty", "both/lower"), ("both/upper", "upper-dir/inside"),
    ],
)  # fmt: skip
def test_exchange(populated: Layers, one: str, other: str) -> None:
    root = populated.path

    def seen(name: str) -> object:
        path = root / name
        return os.readlink(path) if path.is_symlink() else os.listdir(path) if path.is_dir() else path.read_text()

    before = seen(one), seen(other)
    numbers = os.lstat(root / one).st_ino, os.lstat(root / other).st_ino
    rename(root / one, root / other, RENAME_EXCHANGE)
    assert (seen(other), seen(one)) == before
    assert (os.lstat(root / other).st_ino, os.lstat(root / one).st_ino) == numbers
    as_in_the_kernel(populated)


def test_an_exchanged_directory_hides_what_is_below_its_new_name(populated: Layers) -> None:
    """It takes the place of a file that has itself been put over a lower directory."""
    root = populated.path
    os.unlink(root / "lower-dir" / "inside")
    os.rmdir(root / "lower-dir")
    (root / "lower-dir").write_text("a file now")
    rename(root / "lower-dir", root / "upper-dir", RENAME_EXCHANGE)
    assert os.listdir(root / "lower-dir") == ["inside"]
    assert (root / "lower-dir" / "inside").read_text() == "upper"
    assert (root / "upper-dir").read_text() == "a file now"
    as_in_the_kernel(populated)


def test_to_another_name_of_the_same_file_does_nothing(layers: Layers) -> None:
    (layers.upper / "one").write_text("text")
    os.link(layers.upper / "one", layers.upper / "two")
    root = layers.mount()
    os.rename(root / "one", root / "two")
    assert sorted(os.listdir(root)) == ["one", "two"]
    rename(root / "one", root / "two", RENAME_EXCHANGE)
    assert sorted(os.listdir(root)) == ["one", "two"]


def test_open_files_and_directories_follow(populated: Layers) -> None:
    root = populated.path
    fd = os.open(root / "lower-file", os.O_RDWR)
    replaced = os.open(root / "upper-file", os.O_RDONLY)
    folder = os.open(root / "upper-dir", os.O_RDONLY)
    try:
        os.rename(root / "lower-file", root / "upper-file")
        os.rename(root / "upper-dir", root / "both" / "deeper")
        os.write(fd, b"LOWER")
        assert (root / "upper-file").read_text() == "LOWER"
        assert os.fstat(replaced).st_nlink == 0
        assert os.pread(replaced, 10, 0) == b"upper"
        assert os.listdir(folder) == ["inside"]
        with open("inside", opener=lambda path, flags: os.open(path, flags, dir_fd=folder)) as file:
            assert file.read() == "upper"
        assert os.readlink(f"/proc/self/fd/{folder}") == str(root / "both" / "deeper")
    finally:
        for number in (fd, replaced, folder):
            os.close(number)


def test_back_and_forth_leaves_the_tree_as_it_was(populated: Layers) -> None:
    root = populated.path
    before = describe(root)
    for _ in range(5):
        os.rename(root / "lower-file", root / "upper-dir" / "guest")
        os.rename(root / "upper-dir", root / "travelling")
        os.rename(root / "travelling" / "guest", root / "lower-file")
        os.rename(root / "travelling", root / "upper-dir")
    assert describe(root) == before
    assert os.listdir(populated.upper / "upper-dir") == ["inside"], "no whiteouts where nothing is below"
    as_in_the_kernel(populated)


def test_between_layers_of_three(new_layers: Callable[..., Layers]) -> None:
    layers = new_layers(lowers=3)
    (layers.lowers[2] / "dir").mkdir()
    (layers.lowers[2] / "dir" / "bottom").write_text("bottom")
    (layers.lowers[1] / "dir").mkdir()
    (layers.lowers[1] / "dir" / "middle").write_text("middle")
    (layers.lowers[0] / "file").write_text("top")
    root = layers.mount()
    os.rename(root / "dir" / "bottom", root / "file")
    os.rename(root / "file", root / "dir" / "middle")
    assert (root / "dir" / "middle").read_text() == "bottom"
    assert os.listdir(root) == ["dir"]
    as_in_the_kernel(layers)
