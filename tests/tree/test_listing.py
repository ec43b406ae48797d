"""Merged directories read while they change."""

import ctypes
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overt.host.libc import libc

from .ground import Layers, whiteout

MANY = 3000
"""entries: more than fit into one request"""


class Dirent(ctypes.Structure):
    """struct dirent (readdir(3))."""

    _fields_ = (
        ("ino", ctypes.c_uint64), ("off", ctypes.c_int64), ("reclen", ctypes.c_uint16), ("kind", ctypes.c_uint8),
        ("name", ctypes.c_char * 256),
    )  # fmt: skip


libc.opendir.restype = ctypes.c_void_p
libc.readdir.restype = ctypes.POINTER(Dirent)
libc.telldir.restype = ctypes.c_long
for function in (libc.readdir, libc.telldir, libc.rewinddir, libc.closedir):
    function.argtypes = [ctypes.c_void_p]
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]


class Stream:
    """A directory stream."""

    def __init__(self, path: Path) -> None:
        self._dir = libc.opendir(os.fsencode(path))
        assert self._dir

    def read(self) -> str | None:
        """The next name but dots, None at the end."""
        while entry := libc.readdir(self._dir):
            name = os.fsdecode(entry.contents.name)
            if name not in (".", ".."):
                return name
        return None

    def rest(self) -> list[str]:
        """All names from here on."""
        return list(iter(self.read, None))

    def tell(self) -> int:
        return int(libc.telldir(self._dir))

    def seek(self, place: int) -> None:
        libc.seekdir(self._dir, place)

    def rewind(self) -> None:
        libc.rewinddir(self._dir)

    def close(self) -> None:
        libc.closedir(self._dir)


@contextmanager
def stream(path: Path) -> Iterator[Stream]:
    opened = Stream(path)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture(params=["merged", "upper", "lower"])
def crowded(request: pytest.FixtureRequest, layers: Layers) -> Path:
    """A directory with many entries, f0, f1, ..."""
    for layer in (layers.upper, layers.lower):
        (layer / "dir").mkdir()
    for number in range(MANY):
        upper = request.param == "upper" or (request.param == "merged" and number % 2)
        ((layers.upper if upper else layers.lower) / "dir" / f"f{number}").touch()
    if request.param == "merged":
        for number in range(100):
            (layers.lower / "dir" / f"gone{number}").touch()
            whiteout(layers.upper / "dir" / f"gone{number}")
    elif request.param == "upper":
        (layers.lower / "dir").rmdir()
    else:
        (layers.upper / "dir").rmdir()
    return layers.mount() / "dir"


ALL = {f"f{number}" for number in range(MANY)}


def test_every_name_once(crowded: Path) -> None:
    names = os.listdir(crowded)
    assert len(names) == MANY
    assert set(names) == ALL


def test_what_stays_is_read_once_while_others_come_and_go(crowded: Path) -> None:
    with stream(crowded) as reader:
        seen = [reader.read() for _ in range(100)]
        for number in range(0, MANY, 3):
            os.unlink(crowded / f"f{number}")
        for number in range(500):
            (crowded / f"new{number}").touch()
        for number in range(1, 1000, 3):
            os.rename(crowded / f"f{number}", crowded / f"renamed{number}")
        seen += reader.rest()
    stayed = {f"f{number}" for number in range(MANY) if number % 3 and not (number < 1000 and number % 3 == 1)}
    assert stayed <= set(seen)
    assert len(seen) == len(set(seen))
    assert len(os.listdir(crowded)) == MANY - MANY // 3 + 500


def test_removing_what_was_just_read_removes_everything(crowded: Path) -> None:
    """rm -r, by a program that reads a little, removes that, and reads on."""
    with stream(crowded) as reader:
        while (name := reader.read()) is not None:
            os.unlink(crowded / name)
    assert os.listdir(crowded) == []
    os.rmdir(crowded)


def test_rm_r(crowded: Path) -> None:
    shutil.rmtree(crowded)
    assert not crowded.exists()


def test_places_stay_while_entries_come_and_go(crowded: Path) -> None:
    with stream(crowded) as reader:
        for _ in range(MANY // 2):
            reader.read()
        place = reader.tell()
        after = reader.rest()
        for number in range(0, MANY, 5):
            os.unlink(crowded / f"f{number}")
        (crowded / "new").touch()
        reader.seek(place)
        # Whether what came or went is shown is open until the stream is rewound (readdir(3)).
        again = reader.rest()
        assert [name for name in again if (crowded / name).exists() and name != "new"] == [
            name for name in after if (crowded / name).exists()
        ]
        assert set(again) <= {*after, "new"}
        reader.rewind()
        assert set(reader.rest()) == set(os.listdir(crowded))


def test_two_streams_read_independently(crowded: Path) -> None:
    with stream(crowded) as one, stream(crowded) as other:
        first = [one.read() for _ in range(10)]
        assert [other.read() for _ in range(20)][:10] == first
        os.unlink(crowded / str(first[0]))
        one_rest, other_rest = one.rest(), other.rest()
        assert one_rest[10:] == other_rest
        assert len(first) + len(one_rest) == MANY


def test_a_stream_opened_before_shows_what_came_since(crowded: Path) -> None:
    with stream(crowded) as reader:
        (crowded / "new").touch()
        os.unlink(crowded / "f7")
        assert set(reader.rest()) == ALL - {"f7"} | {"new"}
        os.mkdir(crowded / "dir")
        reader.rewind()
        assert {"new", "dir"} <= set(reader.rest())


def test_readers_and_writers_at_once(crowded: Path) -> None:
    """What nobody touches is seen by every reading, once."""
    stop = threading.Event()
    problems: list[str] = []

    def change() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            path = crowded / f"passing{number % 50}"
            path.touch()
            os.rename(path, crowded / f"other{number % 50}")
            if number % 3 == 0:
                os.unlink(crowded / f"other{number % 50}")

    def read() -> None:
        for _ in range(5):
            with stream(crowded) as reader:
                names = reader.rest()
            stayed = [name for name in names if name.startswith("f")]
            if len(stayed) != MANY or set(stayed) != ALL:
                problems.append(f"{len(stayed)} names, {len(set(stayed))} different ones")

    writer = threading.Thread(target=change)
    readers = [threading.Thread(target=read) for _ in range(3)]
    for thread in (writer, *readers):
        thread.start()
    for thread in readers:
        thread.join(60)
    stop.set()
    writer.join(60)
    assert not problems
    assert not any(thread.is_alive() for thread in (writer, *readers))


def test_kinds_of_entries_are_known_without_stat(layers: Layers) -> None:
    for number, layer in enumerate((layers.upper, layers.lower)):
        (layer / f"file{number}").touch()
        (layer / f"dir{number}").mkdir()
        (layer / f"link{number}").symlink_to("x")
        os.mkfifo(layer / f"fifo{number}")
    root = layers.mount()
    (root / "file2").touch()
    (root / "dir2").mkdir()
    kinds = {entry.name: (entry.is_file(follow_symlinks=False), entry.is_dir(follow_symlinks=False), entry.is_symlink())
             for entry in os.scandir(root)}  # fmt: skip
    for number in range(2):
        assert kinds[f"file{number}"] == (True, False, False)
        assert kinds[f"dir{number}"] == (False, True, False)
        assert kinds[f"link{number}"] == (False, False, True)
        assert kinds[f"fifo{number}"] == (False, False, False)
    assert kinds["file2"] == (True, False, False)
    assert kinds["dir2"] == (False, True, False)


def test_dots_are_there_and_lead_where_they_should(layers: Layers) -> None:
    (layers.lower / "a" / "b").mkdir(parents=True)
    root = layers.mount()
    for _ in range(2):
        listed = {}
        directory = libc.opendir(os.fsencode(root / "a" / "b"))
        while entry := libc.readdir(directory):
            listed[entry.contents.name] = entry.contents.ino
        libc.closedir(directory)
        assert listed == {b".": os.stat(root / "a" / "b").st_ino, b"..": os.stat(root / "a").st_ino}


def test_listing_after_listing_is_current(new_layers: Callable[..., Layers]) -> None:
    """The kernel keeps what it has read; whatever changes the directory has to end that."""
    layers = new_layers(lowers=2)
    for layer in layers.lowers:
        (layer / "dir").mkdir()
        (layer / "dir" / layer.name).touch()
    directory = layers.mount() / "dir"
    expected = {"lower0", "lower1"}

    def step(change: Callable[[], object], *, add: str = "", remove: str = "") -> None:
        change()
        expected.update({add} - {""})
        expected.difference_update({remove})
        for _ in range(2):
            assert set(os.listdir(directory)) == expected

    step(lambda: (directory / "new").touch(), add="new")
    step(lambda: os.unlink(directory / "lower0"), remove="lower0")
    step(lambda: os.mkdir(directory / "lower0"), add="lower0")
    step(lambda: os.rename(directory / "new", directory / "old"), add="old", remove="new")
    step(lambda: os.link(directory / "old", directory / "second"), add="second")
    step(lambda: os.symlink("x", directory / "link"), add="link")
    step(lambda: os.rename(directory / "link", directory / "second"), remove="link")
    step(lambda: os.rmdir(directory / "lower0"), remove="lower0")
    step(lambda: os.rename(directory / "old", directory.parent / "away"), remove="old")
    step(lambda: os.mknod(directory / "node"), add="node")
