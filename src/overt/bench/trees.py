"""What the layers hold. Every tree is the same at every run."""

import io
import os
import tarfile
from pathlib import Path

from overt.bench import tools
from overt.bench.sample import Scale

PAST = 1_700_000_000
"""Modification time of all files, in seconds: git looks into a file that is as young as its index."""

LAYERS = 3
DIRECTORIES = 50


def some_files(directory: Path, prefix: str, count: int, content: bytes) -> None:
    """Write `count` files named `prefix` and a number of five digits."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = directory / f"{prefix}{number:05}"
        path.write_bytes(content)
        os.utime(path, (PAST, PAST))


def merged(place: Path, scale: Scale) -> list[Path]:
    """Three layers that all have the same directories; a third of each layer's files hide some of the layer below."""
    each = scale.listed // (DIRECTORIES * (LAYERS - 1))
    lowers: list[Path] = []
    for number in range(LAYERS):
        layer = place / f"layer{number}"
        for directory in range(DIRECTORIES):
            some_files(layer / f"directory{directory}", "common", each // 3, b"x")
            some_files(layer / f"directory{directory}", f"only{number}-", each - each // 3, b"x")
        lowers.insert(0, layer)
    return lowers


def merged_upper(upper: Path, scale: Scale) -> None:
    """A few files in each of those directories."""
    for directory in range(DIRECTORIES):
        some_files(upper / f"directory{directory}", "own", 5, b"x")


def tarball(archive: Path, count: int) -> None:
    """An archive of `count` files of up to 4 KiB, a hundred to a directory."""
    with tarfile.open(archive, "w") as tar:
        for number in range(count):
            if number % 100 == 0:
                entry = tarfile.TarInfo(f"d{number // 100:03}")
                entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, PAST
                tar.addfile(entry)
            content = b"overt " * (number * 97 % 680)
            entry = tarfile.TarInfo(f"d{number // 100:03}/f{number:05}")
            entry.size, entry.mode, entry.mtime = len(content), 0o644, PAST
            tar.addfile(entry, io.BytesIO(content))


def checkout(place: Path, scale: Scale) -> list[Path]:
    """One layer that is a git repository with all files committed, fifty to a directory."""
    top = place / "top"
    for number in range(scale.checkout // 50):
        some_files(top / f"src{number % 10}" / f"part{number}", "file", 50, b"line\n" * (1 + number % 40))
    git = ("git", "-C", str(top), "-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "gc.auto=0")
    tools.run(*git, "init", "-q")
    tools.run(*git, "add", "-A")
    tools.run(*git, "commit", "-q", "-m", "All")
    return [top]
