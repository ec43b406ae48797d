"""Inode numbers: one for each file, the same before and after copy-up and a new mount, and the kernel's."""

import ctypes
import mmap
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overt.host import mounts
from overt.server.watchdog import abort
from overt.tree import reading
from overt.tree.copyup import copy_up

from .ground import Layers, libc, marks
from .test_nodes import tree_of
from .twins import listed_otherwise

ORIGIN = "trusted.overlay.origin"
THINGS = ("file", "link", "fifo", "dir", "dir/file")


def furnish(layer: Path) -> None:
    (layer / "dir").mkdir()
    for name in ("file", "dir/file"):
        (layer / name).write_text(name)
    (layer / "link").symlink_to("file")
    os.mkfifo(layer / "fifo")


def change(root: Path) -> None:
    for name in THINGS:
        os.lchown(root / name, 3, 4)


def numbers(root: Path) -> dict[str, int]:
    return {name: os.lstat(root / name).st_ino for name in THINGS}


def test_a_copy_keeps_its_number_over_mounts_and_in_the_kernel(layers: Layers) -> None:
    furnish(layers.lower)
    root = layers.mount()
    before = numbers(root)
    change(root)
    assert numbers(root) == before
    layers.umount()
    assert {name: os.lstat(layers.lower / name).st_ino for name in THINGS} == before
    assert all(os.lstat(layers.upper / name).st_ino != before[name] for name in THINGS)
    with layers.kernel() as path:
        assert numbers(path) == before
        assert not listed_otherwise(path)
    assert not listed_otherwise(layers.mount())
    assert numbers(root) == before


def test_the_kernels_copies_keep_theirs_here(layers: Layers) -> None:
    furnish(layers.lower)
    with layers.kernel() as path:
        before = numbers(path)
        change(path)
    root = layers.mount()
    assert not listed_otherwise(root)
    assert numbers(root) == before


def test_the_origin_is_the_kernels_byte_for_byte(new_layers: Callable[..., Layers]) -> None:
    layers = new_layers()
    furnish(layers.lower)
    written = []
    for by in ("overt", "kernel"):
        if by == "overt":
            change(layers.mount())
            layers.umount()
        else:
            with layers.kernel() as path:
                change(path)
        written.append(
            {name: os.getxattr(layers.upper / name, ORIGIN, follow_symlinks=False) for name in THINGS}
            | {"": marks(layers.upper) - {"trusted.overlay.uuid"}, "in dir": marks(layers.upper / "dir")}
        )
        subprocess.run(["rm", "-rf", layers.upper, layers.work], check=True)
        layers.upper.mkdir()
        layers.work.mkdir()
    assert written[0] == written[1]
    assert written[0][""] == {"trusted.overlay.impure"}


def test_a_copy_keeps_its_number_wherever_it_goes(layers: Layers) -> None:
    """Moved and linked into directories of the upper; the number is the file's, under each of its names."""
    furnish(layers.lower)
    root = layers.mount()
    number = os.stat(root / "file").st_ino
    for name in ("one", "two", "three"):
        (root / name).mkdir()
    os.rename(root / "file", root / "one" / "moved")
    os.link(root / "one" / "moved", root / "two" / "linked")
    layers.umount()
    layers.mount()
    for name in ("one/moved", "two/linked"):
        assert os.stat(root / name).st_ino == number
    assert not listed_otherwise(root)
    layers.umount()
    assert marks(layers.upper / "three") == set()
    with layers.kernel() as path:
        assert [os.stat(path / name).st_ino for name in ("one/moved", "two/linked")] == [number] * 2
        assert not listed_otherwise(path)


def test_one_of_two_names_is_another_file_once_it_is_copied_up(layers: Layers) -> None:
    (layers.lower / "one").write_text("text")
    os.link(layers.lower / "one", layers.lower / "two")
    root = layers.mount()
    os.chmod(root / "one", 0o600)
    assert marks(layers.upper / "one") == set()
    layers.umount()
    layers.mount()
    assert os.stat(root / "one").st_ino == os.stat(layers.upper / "one").st_ino
    assert os.stat(root / "two").st_ino == os.stat(layers.lower / "two").st_ino


def test_and_is_listed_as_that_by_whoever_has_read_the_directory_before(layers: Layers) -> None:
    """The kernel keeps what it has read as long as the directory's mtime stays, and a copy-up leaves that."""
    (layers.lower / "one").write_text("text")
    os.link(layers.lower / "one", layers.lower / "two")
    root = layers.mount()
    os.listdir(root)
    os.chmod(root / "one", 0o600)
    assert not listed_otherwise(root)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of getdents64")
def test_who_reads_a_listing_into_a_page_of_the_same_mount_while_it_changes_does_not_hang(
    new_layers: Callable[..., Layers],
) -> None:
    """He has the listing's page while he waits for the server, which must not wait for that page then."""
    layers = new_layers(options="nopassthrough")
    (layers.lower / "dir").mkdir()
    for number in range(_READINGS):
        (layers.lower / "dir" / f"a{number}").touch()
        os.link(layers.lower / "dir" / f"a{number}", layers.lower / "dir" / f"b{number}")
    with open(layers.lower / "big", "wb") as big:
        big.truncate(_READINGS * _ROOM)
    root = layers.mount()
    reading = threading.Thread(target=read_into_itself, args=(root,), daemon=True)
    reading.start()
    reading.join(30)
    if reading.is_alive():
        abort(os.stat(root).st_dev)
        raise AssertionError("it hangs")


_READINGS, _ROOM = 100, 1 << 17


def read_into_itself(root: Path) -> None:
    with open(root / "big", "rb") as big:
        into = libc.mmap(None, _READINGS * _ROOM, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, big.fileno(), 0)
    for number in range(_READINGS):
        os.listdir(root / "dir")
        directory = os.open(root / "dir", os.O_RDONLY | os.O_DIRECTORY)
        os.stat(root / "dir" / f"a{number}")
        changing = threading.Thread(target=os.chmod, args=(root / "dir" / f"a{number}", 0o600))
        changing.start()
        time.sleep(number % 10 * 5e-5)
        assert libc.syscall(217, directory, ctypes.c_void_p(into + number * _ROOM), 1 << 16) > 0
        changing.join()
        os.close(directory)
    libc.munmap(into, _READINGS * _ROOM)


def test_nor_otherwise_when_the_kernel_has_forgotten_it(layers: Layers) -> None:
    (layers.lower / "one").write_text("text")
    os.link(layers.lower / "one", layers.lower / "two")
    with tree_of(layers) as tree:
        tree.root.listing = reading.read(tree, tree.root)
        node, _ = tree.lookup(tree.root, b"one")
        copy_up(tree, node)
        shown = node.ino
        tree.unused(node)
        entry = tree.root.listing.get(b"one")
        assert tree.listed_ino(tree.root, entry) == shown == os.stat(layers.upper / "one").st_ino


@pytest.mark.parametrize(
    "spoil",
    [
        lambda value: b"", lambda value: b"\xff" * 200, lambda value: value[:-1], lambda value: value[:20],
        lambda value: value[:5] + bytes(16) + value[21:], lambda value: value[:5] + b"u" * 16 + value[21:],
        lambda value: value[:-4] + b"\xee" * 4, lambda value: value[:4] + b"\x99" + value[5:],
    ],
    ids=["empty", "noise", "cut", "no uuid", "uuid zero", "another filesystem", "another file", "another type"],
)  # fmt: skip
def test_an_origin_that_leads_nowhere_leaves_a_copy_its_own_number(
    layers: Layers, spoil: Callable[[bytes], bytes]
) -> None:
    furnish(layers.lower)
    change(layers.mount())
    layers.umount()
    value = os.getxattr(layers.upper / "file", ORIGIN)
    os.setxattr(layers.upper / "file", ORIGIN, spoil(value))
    root = layers.mount()
    assert os.stat(root / "file").st_ino == os.stat(layers.upper / "file").st_ino
    assert (root / "file").read_text() == "file"
    assert not listed_otherwise(root)


def test_an_origin_of_another_kind_is_not_believed(layers: Layers) -> None:
    furnish(layers.lower)
    change(layers.mount())
    layers.umount()
    os.setxattr(layers.upper / "file", ORIGIN, os.getxattr(layers.upper / "dir", ORIGIN))
    root = layers.mount()
    assert os.stat(root / "file").st_ino == os.stat(layers.upper / "file").st_ino


@pytest.fixture
def elsewhere(layers: Layers) -> Iterator[Layers]:
    """Lower layers on two tmpfs, where new files have small numbers, below an upper on ext4."""
    layers.lowers = [layers.place / "other0" / "lower", layers.place / "other1" / "lower"]
    for lower in layers.lowers:
        lower.parent.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", lower.parent], check=True, timeout=30)
        lower.mkdir()
    yield layers
    if os.path.ismount(layers.path):
        mounts.umount(layers.path)
    for lower in layers.lowers:
        mounts.umount(lower.parent)


@pytest.mark.parametrize("xino", ["on", "auto"])
def test_on_several_filesystems_they_are_the_kernels(elsewhere: Layers, xino: str) -> None:
    elsewhere.features = f"xino={xino}"
    furnish(elsewhere.lowers[1])
    for name in ("top", "top2"):
        (elsewhere.lowers[0] / name).touch()
    (elsewhere.upper / "own").touch()
    with elsewhere.kernel() as path:
        expected = {name: os.lstat(path / name).st_ino for name in (*THINGS, "top", "top2", "own", ".")}
    root = elsewhere.mount()
    shown = {name: os.lstat(root / name).st_ino for name in expected}
    assert shown == expected
    assert len(set(shown.values())) == len(shown)
    change(root)
    assert {name: os.lstat(root / name).st_ino for name in expected} == expected
    assert not listed_otherwise(root)
    elsewhere.umount()
    elsewhere.mount()
    assert {name: os.lstat(root / name).st_ino for name in expected} == expected
    assert not listed_otherwise(root)
    with elsewhere.kernel() as path:
        assert {name: os.lstat(path / name).st_ino for name in expected} == expected
