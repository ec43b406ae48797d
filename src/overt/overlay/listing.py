"""A merged directory as a list that keeps its place.

Readers of a directory hold a *cookie*: "go on after this one". The kernel may hold it for long, hand it back through
another descriptor, and delete what it has just read (``rm -r``), so cookies must stay right while entries come and go.
Every name gets the next number when it is first seen, and keeps it; an entry that goes leaves a gap; one that comes
stands at the end. Nobody who reads from start to end misses an entry that was there all the time, or sees one twice.
(readdir(3): whether an entry added meanwhile is returned is unspecified.)
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

DT_UNKNOWN = 0
DT_CHR = 2
DT_DIR = 4


class Entry(NamedTuple):
    """One name of a directory: the layer's inode number, the DT_* type, the name, and the layer's index."""

    ino: int
    kind: int
    name: bytes
    layer: int


class Listing:
    """The entries of one directory; a cookie is the position after an entry, 0 the start."""

    __slots__ = ("_entries", "_places")

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries: list[Entry | None] = list(entries)
        self._places = {entry.name: place for place, entry in enumerate(self._entries) if entry is not None}

    def after(self, cookie: int, end: int | None = None) -> Iterator[tuple[int, Entry]]:
        """The entries that follow `cookie`, up to cookie `end`, each with the cookie that follows it."""
        entries = self._entries
        for place in range(max(cookie, 0), len(entries) if end is None else min(end, len(entries))):
            entry = entries[place]
            if entry is not None:
                yield place + 1, entry

    def add(self, entry: Entry) -> None:
        """Enter a name; one that is there already keeps its place."""
        place = self._places.get(entry.name)
        if place is None:
            self._places[entry.name] = len(self._entries)
            self._entries.append(entry)
        else:
            self._entries[place] = entry

    def discard(self, name: bytes) -> None:
        """Take a name out, if it is there."""
        place = self._places.pop(name, None)
        if place is not None:
            self._entries[place] = None

    def get(self, name: bytes) -> Entry | None:
        """The entry of this name, or None."""
        place = self._places.get(name)
        return None if place is None else self._entries[place]

    @property
    def end(self) -> int:
        """The cookie after the last entry."""
        return len(self._entries)

    @property
    def gaps(self) -> int:
        """How many entries have gone since the listing was made."""
        return len(self._entries) - len(self._places)

    def __len__(self) -> int:
        return len(self._places)


def merge(layers: Iterable[Iterable[tuple[Entry, bool]]]) -> list[Entry]:
    """Merge layers' entries, uppermost first; the bool says that an entry is a whiteout. A name's first layer wins."""
    merged: dict[bytes, Entry | None] = {}
    for layer in layers:
        for entry, whiteout in layer:
            merged.setdefault(entry.name, None if whiteout else entry)
    return [entry for entry in merged.values() if entry is not None]
