"""Lower layers that are unpacked image layers (whiteouts=oci), shown as fuse-overlayfs shows them."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .ground import Layers, describe, is_whiteout, marks


@pytest.fixture
def image(new_layers: Callable[..., Layers]) -> Layers:
    """Three layers of an image."""
    layers = new_layers(lowers=3, options="whiteouts=oci")
    top, middle, bottom = layers.lowers
    for layer, names in (
        (bottom, ["gone", "back", "dir/gone", "dir/seen", "opaque/gone", "opaque/deep/gone", "whole/gone", "x/y/z"]),
        (middle, [".wh.gone", "dir/.wh.gone", "opaque/.wh..wh..opq", "opaque/new", ".wh.whole", ".wh.back", "x/.wh.y"]),
        (top, ["back", "opaque/top", "whole/new", "same", ".wh.same", "x/y/new"]),
    ):
        for name in names:
            path = layer / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("" if ".wh." in name else f"{layer.name}/{name}")
    return layers


EXPECTED = {
    ".": ["back", "dir", "opaque", "same", "whole", "x"], "dir": ["seen"], "opaque": ["new", "top"], "whole": ["new"],
    "x": ["y"], "x/y": ["new"],
}  # fmt: skip


def listed(root: Path) -> dict[str, list[str]]:
    return {os.path.relpath(directory, root): sorted([*folders, *files]) for directory, folders, files in os.walk(root)}


def test_files_that_are_whiteouts_hide(image: Layers) -> None:
    root = image.mount()
    for name in ("gone", "dir/gone", "opaque/deep", "whole/gone", ".wh.gone", "opaque/.wh..wh..opq", "x/y/z"):
        assert not os.path.lexists(root / name)
    assert listed(root) == EXPECTED
    assert (root / "back").read_text() == "lower0/back"


@contextmanager
def fuse_overlayfs(layers: Layers) -> Iterator[Path]:
    subprocess.run(["fuse-overlayfs", "-o", layers.words, layers.path], check=True, timeout=30)
    try:
        yield layers.path
    finally:
        subprocess.run(["umount", layers.path], check=True, timeout=30)
        time.sleep(0.2)  # until the other server is gone


@pytest.mark.skipif(not shutil.which("fuse-overlayfs"), reason="no fuse-overlayfs")
def test_as_fuse_overlayfs_shows_them(image: Layers) -> None:
    """But for a name beside its own whiteout, which is gone there (docs/decisions/0015)."""
    (image.lowers[0] / "same").unlink()
    with fuse_overlayfs(image) as path:
        expected = describe(path)
    root = image.mount()
    assert listed(root) == EXPECTED | {".": [name for name in EXPECTED["."] if name != "same"]}
    shown = describe(root)
    assert {name: value[:2] for name, value in shown.items()} == {name: value[:2] for name, value in expected.items()}
    assert list(shown) == list(expected)


def test_what_is_written_are_the_kernels_marks(image: Layers) -> None:
    root = image.mount()
    os.unlink(root / "dir" / "seen")
    assert is_whiteout(image.upper / "dir" / "seen")
    (root / "gone").mkdir()
    (root / "dir" / "gone").write_text("again")
    os.unlink(root / "dir" / "gone")
    assert not os.path.lexists(image.upper / "dir" / "gone"), "nothing is hidden there"
    assert marks(image.upper / "gone") == set()
    os.rename(root / "back", root / "moved")
    before = describe(root)
    image.umount()
    assert describe(image.mount()) == before
    assert listed(root)["."] == ["dir", "gone", "moved", "opaque", "same", "whole", "x"]


@pytest.mark.skipif(not shutil.which("fuse-overlayfs"), reason="no fuse-overlayfs")
def test_where_fuse_overlayfs_differs(image: Layers) -> None:
    """What docs/decisions/0015 says of it; here the layer's own name is there."""
    with fuse_overlayfs(image) as path:
        assert not os.path.lexists(path / "same")
    assert (image.mount() / "same").read_text() == "lower0/same"


def test_directories_are_renamed_and_removed(image: Layers) -> None:
    image.features = "redirect_dir=on"
    root = image.mount()
    numbers = {name: os.stat(root / name).st_ino for name in EXPECTED}
    os.rename(root / "opaque", root / "dir" / "moved")
    os.rename(root / "x", root / "w")
    os.chmod(root / "w" / "y" / "new", 0o600)
    os.unlink(root / "w" / "y" / "new")
    os.rmdir(root / "w" / "y")
    before = describe(root)
    image.umount()
    assert describe(image.mount()) == before
    assert sorted(os.listdir(root / "dir" / "moved")) == ["new", "top"]
    assert os.stat(root / "dir" / "moved").st_ino == numbers["opaque"]
    assert os.listdir(root / "w") == []


def test_a_copy_keeps_its_number(image: Layers) -> None:
    root = image.mount()
    number = os.stat(root / "back").st_ino
    os.chmod(root / "back", 0o600)
    image.umount()
    image.mount()
    assert os.stat(root / "back").st_ino == number


def test_a_layer_that_hides_all_below(image: Layers) -> None:
    (image.lowers[1] / ".wh..wh..opq").touch()
    root = image.mount()
    assert listed(root)["."] == ["back", "dir", "opaque", "same", "whole", "x"]
    assert not (root / "dir" / "seen").exists()


def test_without_the_option_they_are_files_like_others(image: Layers) -> None:
    image.options = ""
    root = image.mount()
    assert (root / ".wh.gone").exists()
    assert (root / "gone").exists()
    expected = describe(root)
    with image.kernel() as path:
        assert describe(path) == expected
