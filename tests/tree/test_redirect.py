"""Directories with a lower part that are renamed (redirect_dir=on), and redirects that others have left.

Whatever overt shows of them the kernel has to show of the same layers, and the other way round.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from overt.host.files import RENAME_EXCHANGE, renameat2

from .ground import Layers, describe, is_whiteout, marks, opaque, whiteout

REDIRECT = "trusted.overlay.redirect"


def redirect(path: Path) -> str:
    return os.getxattr(path, REDIRECT).decode()


def fill(layer: Path, *names: str) -> None:
    """Files that say what they are, with the directories above them."""
    for name in names:
        path = layer / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{layer.name}/{name}")


def as_in_the_kernel(layers: Layers) -> None:
    """What overt shows, the kernel shows too, and overt again after a new mount."""
    expected = describe(layers.path)
    with layers.kernel() as path:
        assert describe(path) == expected
    assert describe(layers.mount()) == expected


@pytest.fixture
def renaming(new_layers: Callable[..., Layers]) -> Layers:
    """Two lower layers, of which each has some of ``dir``, and one alone has ``old``; mounted."""
    layers = new_layers(lowers=2, features="redirect_dir=on")
    fill(layers.upper, "dir/up", "own/file")
    fill(layers.lowers[0], "dir/top", "dir/sub/top", "dir/same", "empty/gone")
    fill(layers.lowers[1], "dir/bottom", "dir/sub/bottom", "dir/same", "old/sub/file")
    layers.mount()
    return layers


def test_within_a_directory_a_redirect_is_one_name(renaming: Layers) -> None:
    root = renaming.path
    before, number = describe(root / "dir"), os.stat(root / "dir").st_ino
    os.rename(root / "dir", root / "moved")
    assert describe(root / "moved") == before
    assert os.stat(root / "moved").st_ino == number
    assert not os.path.lexists(root / "dir")
    assert redirect(renaming.upper / "moved") == "dir"
    assert is_whiteout(renaming.upper / "dir")
    as_in_the_kernel(renaming)
    assert os.stat(root / "moved").st_ino == number


def test_into_another_directory_it_is_a_path(renaming: Layers) -> None:
    root = renaming.path
    os.rename(root / "dir" / "sub", root / "own" / "moved")
    assert redirect(renaming.upper / "own" / "moved") == "/dir/sub"
    assert sorted(os.listdir(root / "own" / "moved")) == ["bottom", "top"]
    as_in_the_kernel(renaming)


def test_one_that_was_renamed_before(renaming: Layers) -> None:
    """A name is enough while it stays in its directory; a path stays; the names above are the lower tree's."""
    root = renaming.path
    os.rename(root / "dir", root / "one")
    os.rename(root / "one", root / "two")
    assert redirect(renaming.upper / "two") == "dir"
    os.rename(root / "two" / "sub", root / "two" / "below")
    os.rename(root / "two" / "below", root / "out")
    assert redirect(renaming.upper / "out") == "/dir/sub"
    os.rename(root / "two", root / "old" / "three")
    assert redirect(renaming.upper / "old" / "three") == "/dir"
    os.rename(root / "old" / "three", root / "old" / "four")
    assert redirect(renaming.upper / "old" / "four") == "/dir"
    assert not os.path.lexists(renaming.upper / "old" / "three"), "nothing is hidden there"
    as_in_the_kernel(renaming)


def test_back_to_where_it_was(renaming: Layers) -> None:
    root = renaming.path
    before = describe(root)
    for _ in range(3):
        os.rename(root / "dir", root / "moved")
        os.rename(root / "moved", root / "dir")
        os.rename(root / "dir", root / "own" / "dir")
        os.rename(root / "own" / "dir", root / "dir")
    assert describe(root) == before
    as_in_the_kernel(renaming)


def test_what_is_done_below_a_renamed_directory(renaming: Layers) -> None:
    """Copy-up, whiteouts, new names and look-ups go by where the lower parts are."""
    root = renaming.path
    os.rename(root / "dir", root / "moved")
    with open(root / "moved" / "sub" / "bottom", "a") as file:
        file.write(" and more")
    os.unlink(root / "moved" / "same")
    os.unlink(root / "moved" / "top")
    assert is_whiteout(renaming.upper / "moved" / "same")
    (root / "moved" / "same").mkdir()
    assert marks(renaming.upper / "moved" / "same") == {"trusted.overlay.opaque"}
    (root / "dir").mkdir()
    (root / "dir" / "same").write_text("another directory of the old name")
    assert os.listdir(root / "dir") == ["same"]
    as_in_the_kernel(renaming)


def test_over_an_empty_directory(renaming: Layers) -> None:
    root = renaming.path
    os.unlink(root / "empty" / "gone")
    os.rename(root / "dir", root / "empty")
    assert marks(renaming.upper / "empty") >= {REDIRECT}
    assert "trusted.overlay.opaque" not in marks(renaming.upper / "empty")
    assert sorted(os.listdir(root / "empty")) == ["bottom", "same", "sub", "top", "up"]
    as_in_the_kernel(renaming)


@pytest.mark.parametrize("other", ["old", "own", "own/file", "old/sub"])
def test_exchange(renaming: Layers, other: str) -> None:
    root = renaming.path
    before = os.lstat(root / "dir").st_ino, os.lstat(root / other).st_ino
    renameat2(-100, os.fsencode(root / "dir"), -100, os.fsencode(root / other), RENAME_EXCHANGE)
    assert (os.lstat(root / other).st_ino, os.lstat(root / "dir").st_ino) == before
    assert "same" in os.listdir(root / other)
    as_in_the_kernel(renaming)


def test_removed_when_empty(renaming: Layers) -> None:
    root = renaming.path
    os.rename(root / "old" / "sub", root / "sub")
    os.unlink(root / "sub" / "file")
    os.rmdir(root / "sub")
    assert not os.path.lexists(renaming.upper / "sub")
    os.rmdir(root / "old")
    as_in_the_kernel(renaming)


def test_a_path_that_is_too_long_is_left_to_mv(renaming: Layers) -> None:
    root = renaming.path
    here = root / "own" / ("n" * 250)
    os.mkdir(here)
    os.rename(root / "old", here / "old")
    assert redirect(renaming.upper / "own" / ("n" * 250) / "old") == "/old"
    long = "l" * 255
    os.rename(root / "dir", root / long)
    (renaming.lowers[0] / "deep" / long / "sub").mkdir(parents=True)
    renaming.umount()
    renaming.mount()
    with pytest.raises(OSError) as raised:
        os.rename(root / "deep" / long / "sub", root / "sub")
    assert raised.value.errno == errno.EXDEV
    os.rename(root / "deep" / long / "sub", root / "deep" / long / "sub2")
    os.rename(root / "deep" / long, root / "deep" / "short")
    as_in_the_kernel(renaming)


def test_open_directories_follow(renaming: Layers) -> None:
    root = renaming.path
    folder = os.open(root / "dir", os.O_RDONLY)
    below = os.open(root / "dir" / "sub", os.O_RDONLY)
    try:
        os.rename(root / "dir", root / "moved")
        os.rename(root / "moved" / "sub", root / "sub")
        assert sorted(os.listdir(below)) == ["bottom", "top"]
        assert sorted(os.listdir(folder)) == ["bottom", "same", "top", "up"]
        os.unlink("bottom", dir_fd=below)
        assert os.listdir(root / "sub") == ["top"]
    finally:
        os.close(folder)
        os.close(below)
    as_in_the_kernel(renaming)


def test_through_layers_that_redirect_themselves(renaming: Layers) -> None:
    """Each upper becomes a lower layer of the next overlay: by overt, by the kernel, and by overt again."""
    root = renaming.path
    os.rename(root / "dir", root / "first")
    os.rename(root / "first" / "sub", root / "own" / "sub")
    renaming.umount()
    renaming.stack()
    with renaming.kernel() as path:
        os.rename(path / "first", path / "second")
        os.rename(path / "own", path / "old" / "own")
        os.unlink(path / "old" / "own" / "sub" / "top")
        (path / "second" / "new").write_text("of the second")
    renaming.stack()
    renaming.mount()
    assert os.listdir(root / "old" / "own" / "sub") == ["bottom"]
    assert sorted(os.listdir(root / "second")) == ["bottom", "new", "same", "top", "up"]
    os.rename(root / "second", root / "third")
    os.rename(root / "old" / "own" / "sub", root / "third" / "sub")
    with open(root / "third" / "sub" / "bottom", "a") as file:
        file.write(" and more")
    as_in_the_kernel(renaming)


@pytest.mark.parametrize("mode", ["follow", "off", "", "nofollow"])
def test_without_redirect_dir_on_nothing_is_redirected(new_layers: Callable[..., Layers], mode: str) -> None:
    layers = new_layers(lowers=2, features=f"redirect_dir={mode}" if mode else "")
    fill(layers.lowers[1], "dir/file")
    fill(layers.lowers[0], "moved/own")
    os.setxattr(layers.lowers[0] / "moved", REDIRECT, b"dir")
    whiteout(layers.lowers[0] / "dir")
    root = layers.mount()
    if mode == "nofollow":
        with pytest.raises(PermissionError):
            os.listdir(root / "moved")
        with layers.kernel() as path, pytest.raises(PermissionError):
            os.listdir(path / "moved")
        return
    assert sorted(os.listdir(root / "moved")) == ["file", "own"]
    with pytest.raises(OSError) as raised:
        os.rename(root / "moved", root / "new")
    assert raised.value.errno == errno.EXDEV
    as_in_the_kernel(layers)


def test_what_is_opaque_above_does_not_end_a_path(new_layers: Callable[..., Layers]) -> None:
    """An absolute redirect goes on below an opaque directory and from one that has no lower part."""
    layers = new_layers(lowers=3)
    fill(layers.lowers[2], "a/b/bottom", "x/y/bottom")
    fill(layers.lowers[1], "a/b/middle", "n/m/middle")
    fill(layers.upper, "new/dir/up")
    opaque(layers.lowers[1] / "a")
    os.setxattr(layers.lowers[1] / "a" / "b", REDIRECT, b"/x/y")
    os.setxattr(layers.lowers[1] / "n", REDIRECT, b"x")
    os.setxattr(layers.upper / "new" / "dir", REDIRECT, b"/a/b")
    (layers.upper / "other").mkdir()
    os.setxattr(layers.upper / "other", REDIRECT, b"/n/y")
    for name in "anx":  # a directory that two names lead to is one too many for the kernel
        whiteout(layers.upper / name)
    root = layers.mount()
    assert sorted(os.listdir(root / "new" / "dir")) == ["bottom", "middle", "up"]
    assert os.listdir(root / "other") == ["bottom"]
    as_in_the_kernel(layers)


@pytest.mark.parametrize(
    "value, error",
    [
        (b"", errno.EINVAL), (b"/", errno.EINVAL), (b"a/b", errno.EINVAL), (b"/a//b", errno.EINVAL),
        (b"/dir/", errno.EINVAL), (b".", errno.EACCES), (b"..", errno.EACCES), (b"/..", errno.EACCES),
        (b"/dir/../../outside", errno.EACCES), (b"/link", 0), (b"/link/dir", 0), (b"link", 0), (b"/none/dir", 0),
        (b"/file", 0), (b"n" * 255, 0), (b"n" * 256, 0), (b"/dir\0/..", 0),
    ],
)  # fmt: skip
def test_nothing_leads_out_of_a_layer(new_layers: Callable[..., Layers], value: bytes, error: int) -> None:
    layers = new_layers(lowers=1)
    outside = layers.place / "outside"
    fill(outside, "dir/secret")
    fill(layers.lower, "dir/file", "file")
    (layers.lower / "link").symlink_to(outside)
    (layers.upper / "moved").mkdir()
    os.setxattr(layers.upper / "moved", REDIRECT, value)

    def listed(path: Path) -> object:
        try:
            return sorted(os.listdir(path / "moved"))
        except OSError as raised:
            return raised.errno

    root = layers.mount()
    shown = listed(root)
    assert shown == (error or (["file"] if value.startswith(b"/dir") else []))
    with layers.kernel() as path:
        assert listed(path) == shown
