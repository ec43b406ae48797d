"""What a disk was asked, in order: every write, flush and discard that it has acknowledged.

With it one finds out what would be there if the power went away at any moment: `Recording` gives the contents of the
disk after each request. A disk with a cache may have lost, of what came after the last flush, all or any part; so there
are three answers for a moment: `all` that was acknowledged, `none` of what came after the last flush, and `some` of it,
chosen by chance from a seed. (The kernel's dm-log-writes keeps such a log too; here it needs no device-mapper.)

On the disk's side a record is a header and the bytes written, appended to a file in memory that both sides hold.
"""

import os
import random
import struct
from typing import NamedTuple

_HEADER = struct.Struct("=BQI")  # kind, start, length; the bytes of a write follow
_WRITE, _FLUSH, _DISCARD = 1, 2, 3
LEFT = ("all", "none", "some")


class Recorder:
    """The disk's side."""

    def __init__(self, fd: int) -> None:
        """`fd` is duplicated."""
        self._fd = os.dup(fd)
        self.size = 0
        """bytes recorded so far: a moment"""

    def write(self, start: int, data: memoryview) -> None:
        self._append(_HEADER.pack(_WRITE, start, len(data)), data)

    def flush(self) -> None:
        self._append(_HEADER.pack(_FLUSH, 0, 0))

    def discard(self, start: int, length: int) -> None:
        self._append(_HEADER.pack(_DISCARD, start, length))

    def _append(self, *parts: bytes | memoryview) -> None:
        self.size += os.writev(self._fd, parts)

    def close(self) -> None:
        os.close(self._fd)


class Request(NamedTuple):
    """One that was acknowledged."""

    kind: int
    start: int
    length: int
    data: int
    """where the bytes are in the log"""
    end: int
    """the moment after it: an offset in the log"""


class Recording:
    """The user's side: `base` is a file with the contents at the beginning, `log` what was asked since. Owns both."""

    def __init__(self, base: int, log: int) -> None:
        self.base = base
        self._log = log

    def close(self) -> None:
        os.close(self.base)
        os.close(self._log)

    def requests(self) -> list[Request]:
        """All of them, in order."""
        found, at, size = [], 0, os.fstat(self._log).st_size
        while at < size:
            kind, start, length = _HEADER.unpack(os.pread(self._log, _HEADER.size, at))
            data = at + _HEADER.size
            at = data + (length if kind == _WRITE else 0)
            found.append(Request(kind, start, length, data, at))
        return found

    def contents(self, requests: list[Request], count: int, left: str, seed: int = 0) -> int:
        """A new file in memory with what is on the disk when the power goes away after `count` of `requests`.

        left: how much of what came after the last flush is there, one of LEFT.
        """
        flushed = next((n for n in range(count, 0, -1) if requests[n - 1].kind == _FLUSH), 0)
        kept = requests[: {"all": count, "none": flushed, "some": flushed}[left]]
        if left == "some":
            chance = random.Random(seed)
            kept += [request for request in requests[flushed:count] if chance.random() < 0.5]
        image = os.memfd_create("overt-lab-replay", os.MFD_CLOEXEC)
        _copy(self.base, image)
        for request in kept:
            if request.kind == _WRITE:
                os.pwrite(image, os.pread(self._log, request.length, request.data), request.start)
            elif request.kind == _DISCARD:
                os.pwrite(image, bytes(request.length), request.start)
        return image


def _copy(source: int, target: int) -> None:
    """Copy a file with its holes."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole to the end
            return
        end = os.lseek(source, at, os.SEEK_HOLE)
        while at < end:
            at += os.pwrite(target, os.pread(source, min(end - at, 1 << 20), at), at)
