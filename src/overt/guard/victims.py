"""Whose file was it? From the inodes of which data was lost to overlays, containers and paths.

The tracepoint names inodes of the upper filesystem. A file of a container is a file in its overlay's upper directory,
so these are looked through for the inodes, each with everything below it. The answer is used to keep an error from
those whose file it was not (`--blame owner`). So it has to be certain:

    every inode is found, or the answer is: not known       it may have been a file without a name, of anybody's
    each was there when the error came (its birth time),    else its number may have been another file's before
    at the first of its events
    who has the file now had it when the error came         else nobody would be told: of errors before its start
                                                            a container is not
    the tracepoint lost nothing                             overt.upper.trace says so
    it took no longer than is good for those who wait
"""

import errno
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

from overt.guard.overlay import Overlay
from overt.host import files
from overt.upper.upper import Failed

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_RESOLVE = files.RESOLVE_BENEATH | files.RESOLVE_NO_SYMLINKS | files.RESOLVE_NO_XDEV
MOST = 1_000_000
"""directory entries that are looked at for one error"""
AT_ONCE = 1.0
"""seconds in which an answer has to be there while callers wait for it: all those on this upper"""
LATER = 10.0
"""and while nobody does"""


class Loss(NamedTuple):
    """A file of which data was lost."""

    overlay: Overlay
    path: str
    """in the container's tree"""
    certain: bool
    """it was this file, and not another that had its inode number before"""


def find(overlays: Iterable[Overlay], inodes: Mapping[int, Failed], seconds: float) -> dict[int, list[Loss]]:
    """Files of `overlays`, which are on one upper, by inode: those of `inodes` that are found.

    None if that takes more than `seconds`. A file with several names may be in several overlays.
    """
    found: dict[int, list[Loss]] = {}
    if not inodes:
        return found
    offset = time.time() - time.monotonic()
    deadline, looked = time.monotonic() + seconds, 0
    try:
        for overlay in overlays:
            for directory, name, inode, path in _entries(overlay):
                looked += 1
                if looked > MOST or time.monotonic() > deadline:
                    return {}
                if inode in inodes:
                    born = files.birth_time(directory, name)
                    certain = born is not None and born <= inodes[inode].when + offset
                    found.setdefault(inode, []).append(Loss(overlay, path, certain))
    except OSError:  # something that cannot be looked at
        return {}
    return found


def owners(inodes: Mapping[int, Failed] | None, found: Mapping[int, list[Loss]]) -> set[Overlay] | None:
    """The overlays to be told of an error in `inodes`; None where that is not certain, and all are to be told."""
    if not inodes:
        return None
    told: set[Overlay] = set()
    for inode, failed in inodes.items():
        losses = found.get(inode, [])
        having = {loss.overlay for loss in losses if loss.overlay.is_older_than(failed.number)}
        if not having or not all(loss.certain for loss in losses):
            return None
        told |= having
    return told


def _entries(overlay: Overlay) -> Iterator[tuple[int, bytes, int, str]]:
    """What is in an upper directory: the directory that it is in, its name there, its inode, and its path.

    Raises OSError where the inode numbers there are not the superblock's (a btrfs subvolume has its own).
    """
    top = overlay.upper_directory()
    try:
        if overlay.upper is None or os.fstat(top).st_dev != overlay.upper.s_dev:
            raise OSError(errno.EXDEV, "inode numbers of its own", overlay.name)
        below = [""]
        while below:
            path = below.pop()
            with suppress(FileNotFoundError, NotADirectoryError):  # it has gone meanwhile
                fd = files.openat2(top, path or ".", _DIRECTORY, resolve=_RESOLVE)
                try:
                    with os.scandir(fd) as entries:
                        for entry in entries:
                            inside = f"{path}/{entry.name}" if path else entry.name
                            yield fd, os.fsencode(entry.name), entry.inode(), f"/{inside}"
                            if entry.is_dir(follow_symlinks=False):
                                below.append(inside)
                finally:
                    os.close(fd)
    finally:
        os.close(top)
