"""What a disk is made of: memory, and the rules by which it fails.

There are two copies of the contents. `memory` is what the disk answers reads from: every write it has acknowledged.
`durable` is what a power cut would leave at the least: what had been acknowledged when the last flush succeeded. (A
real disk may keep more than that, in any order; none may keep less.) Between the two stands the set of chunks written
since, and a flush copies these. Both are private anonymous mappings, so that a disk costs the memory that was written
to it, and a hole that is read costs nothing.

A request fails as a whole or not at all, and a failed write leaves the old bytes. The loop queue does not merge
requests (see overt.lab.keeper), and no filesystem puts pages of two files into one: a marker in one file's data
condemns no other file.

No I/O here but dump and load; the FUSE server calls read, write, flush and discard, which raise the OSError to answer.
"""

import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from overt.lab.recording import Recorder

CHUNK = 64 << 10
PAGE = mmap.PAGESIZE
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python 3.11 does not name

# What fail() accepts, and the requests meant by it. A discard is here because the filesystem writes zeros with it.
MEANING = {
    "data": frozenset({"write"}),
    "metadata": frozenset({"write"}),
    "all": frozenset({"write", "flush", "discard"}),
    "write": frozenset({"write"}),
    "read": frozenset({"read"}),
    "flush": frozenset({"flush"}),
    "discard": frozenset({"discard"}),
}
MARKED = ("data", "metadata", "write")
"""those of them that a marker can tell apart"""


class Counters(NamedTuple):
    """Requests that reached the disk; those that it failed are counted in both columns."""

    reads: int = 0
    writes: int = 0
    flushes: int = 0
    discards: int = 0
    failed_reads: int = 0
    failed_writes: int = 0
    failed_flushes: int = 0
    failed_discards: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


_NOTHING = memoryview(b"")
_ZEROS = bytes(CHUNK)
_PLURAL = {"read": "reads", "write": "writes", "flush": "flushes", "discard": "discards"}


@dataclass(slots=True)
class Rule:
    requests: frozenset[str]
    code: int  # the errno to answer
    marker: bytes  # b"": whatever the content is
    start: int  # bytes
    end: int
    without: bool = False  # those are meant that do not contain the marker
    skip: int = 0  # so many go well before the first fails

    def condemns(self, request: str, start: int, end: int, data: memoryview) -> bool:
        """A flush has no place: it is the range from 0 to the disk's end."""
        if request not in self.requests or end <= self.start or start >= self.end:
            return False
        if self.marker and (self.marker in bytes(data)) == self.without:
            return False
        self.skip -= 1
        return self.skip < 0


class Image:
    """A disk of `size` bytes (a multiple of the page size), all zeros."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rules: list[Rule] = []
        self._memory = mmap.mmap(-1, size, flags=_FLAGS)
        self._durable = mmap.mmap(-1, size, flags=_FLAGS)
        self._view = memoryview(self._memory)
        self._written: set[int] = set()  # chunks
        self._unflushed: set[int] = set()
        self._counts = dict.fromkeys(Counters._fields, 0)
        self.recorder: Recorder | None = None

    def counters(self) -> Counters:
        return Counters(**self._counts)

    def read(self, start: int, size: int) -> memoryview:
        end = min(start + size, self.size)
        self._admit("read", start, end)
        self._counts["bytes_read"] += end - start
        return self._view[start:end]

    def write(self, start: int, data: memoryview) -> None:
        end = start + len(data)
        self._admit("write", start, end, data)
        self._counts["bytes_written"] += len(data)
        self._view[start:end] = data
        self._touch(start, end)
        if self.recorder:
            self.recorder.write(start, data)

    def flush(self) -> None:
        self._admit("flush", 0, self.size)
        self._settle()
        if self.recorder:
            self.recorder.flush()

    def discard(self, start: int, size: int) -> None:
        """The range reads as zeros from now on, and gives its memory back."""
        end = min(start + size, self.size)
        self._admit("discard", start, end)
        first, last = -(-start // PAGE) * PAGE, end // PAGE * PAGE
        if first >= last:
            self._memory[start:end] = bytes(end - start)
        else:
            self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)
            self._memory[start:first] = bytes(first - start)
            self._memory[last:end] = bytes(end - last)
        self._touch(start, end)
        if self.recorder:
            self.recorder.discard(start, end - start)

    def dump(self, fd: int, *, durable: bool) -> None:
        """Write the contents to the empty file `fd`, holes where the disk was never written."""
        os.ftruncate(fd, self.size)
        source = memoryview(self._durable) if durable else self._view
        for start, end in self._runs(self._written):
            while start < end:
                start += os.pwrite(fd, source[start:end], start)

    def load(self, fd: int) -> None:
        """Begin with the contents of the file `fd`, as durable."""
        position, size = 0, min(os.fstat(fd).st_size, self.size)
        while position < size:
            try:
                position = os.lseek(fd, position, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole from here
                break
            end = min(os.lseek(fd, position, os.SEEK_HOLE), size)
            while position < end:
                data = os.pread(fd, min(CHUNK - position % CHUNK, end - position), position)
                if not data:
                    raise OSError(errno.EIO, "the image was cut short while it was read")
                if data != _ZEROS[: len(data)]:  # zeros written out, as by mkfs.xfs, need no memory here
                    self._view[position : position + len(data)] = data
                    self._touch(position, position + len(data))
                position += len(data)
        self._settle()

    def _settle(self) -> None:
        """What is acknowledged becomes durable."""
        for start, end in self._runs(self._unflushed):
            self._durable[start:end] = self._view[start:end]
        self._unflushed.clear()

    def _admit(self, request: str, start: int, end: int, data: memoryview = _NOTHING) -> None:
        self._counts[_PLURAL[request]] += 1
        for rule in self.rules:
            if rule.condemns(request, start, end, data):
                self._counts[f"failed_{_PLURAL[request]}"] += 1
                raise OSError(rule.code, os.strerror(rule.code))

    def _touch(self, start: int, end: int) -> None:
        chunks = range(start // CHUNK, -(-end // CHUNK))
        self._written.update(chunks)
        self._unflushed.update(chunks)

    def _runs(self, chunks: set[int]) -> Iterator[tuple[int, int]]:
        """The chunks as ranges of bytes, neighbours joined."""
        start = end = -1
        for chunk in sorted(chunks):
            if chunk != end:
                if end >= 0:
                    yield start * CHUNK, min(end * CHUNK, self.size)
                start = chunk
            end = chunk + 1
        if end >= 0:
            yield start * CHUNK, min(end * CHUNK, self.size)
