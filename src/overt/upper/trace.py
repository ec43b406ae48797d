"""The tracepoint filemap:filemap_set_wb_err: each failed folio, with its superblock and inode number.

It is the one way to tell a second error from a first that the host has not looked at yet: to errseq the two are one
event. The kernel fires it just before it marks the superblock, so once a cursor or a probe has failed, the events are
in the buffer.

The buffer is a tracing instance of our own, so no other user of the tracer is disturbed and none disturbs us. Making
one costs some 10 ms and removing it 60 ms (it waits for RCU), which is why it is one for each process. It
outlives a process that is killed; the next `Trace` removes it (rmdir fails with EBUSY while anybody has it open).

Where the buffer overflows (a disk that loses thousands of folios while nobody asks), the lines say so: then all
watched superblocks count as having events, and their inodes as unknown. A false alarm is the lesser evil. So do the
inodes of one that has too many of them.

Root may switch any instance off, by hand or with `trace-cmd reset -a`. So whoever takes events looks whether it is on.
If it is not, it is switched on again, and events were lost. Only what was off and on again in between goes unnoticed.

Reading takes events out of the buffer. A process that forks others to work for it (overt.guard) must not lose what one
had read when it died. So they are read into memory that all share, and a superblock is noted there as having events
until `kept` says that what came of them is on record, and no more of them was taken since. Who finds such a note begins
with "events were lost".
"""

import errno
import itertools
import mmap
import os
import re
import struct
import threading
from collections.abc import Collection, Iterable
from typing import NamedTuple

from overt.host import mounts

_EVENT = re.compile(rb" (\d+\.\d+): [a-z_]+: dev=(\d+):(\d+) ino=0x([0-9a-f]+)")
_LOST = b"LOST"
_POINT = "events/filemap/filemap_set_wb_err"
_SWITCHES = ("tracing_on", f"{_POINT}/enable")
_TOTAL_KIB = 16 * 1024
_MOST_KIB_EACH = 1410  # what the kernel gives an instance unasked
_FILTER_BYTES = 4000
_READ = 1 << 16
_NOTE = struct.Struct("=Q")
_NOTES = 1 << 13
"""superblocks that can be noted; more are not"""

MOST_INODES = 10_000
"""how many failed inodes are remembered of one superblock"""

_numbers = itertools.count(1)


class Span(NamedTuple):
    """When the events of one inode were: seconds of CLOCK_MONOTONIC.

    Between the two its number may have passed from a file that was removed to another.
    """

    first: float
    last: float


class Events(NamedTuple):
    """What the tracepoint saw on one superblock."""

    inodes: dict[int, Span]
    """of which inodes, and when"""
    lost: bool
    """whether events were lost, so that `inodes` is not all of it"""

    def __bool__(self) -> bool:
        return bool(self.inodes) or self.lost


class Watch:
    """A watcher of one superblock, and the events that it has not taken yet. Made by `Trace.watch`."""

    __slots__ = ("inodes", "lost", "s_dev", "trace")

    def __init__(self, trace: "Trace", s_dev: int) -> None:
        self.trace = trace
        self.s_dev = s_dev
        self.inodes: dict[int, Span] = {}
        self.lost = False

    def take(self) -> Events:
        """What was seen since the last time."""
        with self.trace.lock:
            self.trace.read()
            self.trace.keep_on()
            events = Events(self.inodes, self.lost)
            if events:
                self.inodes, self.lost = {}, False
                self.trace.note_taken(self.s_dev)
            return events

    def close(self) -> None:
        """Collect nothing any more."""
        self.trace.forget(self)


class Trace:
    """The events of the superblocks that are watched. Any thread may call any method."""

    def __init__(self) -> None:
        """Make the instance; OSError where tracefs cannot be had (EPERM, ENODEV) or has no such tracepoint (ENOENT)."""
        mount_fd = mounts.new_mount("tracefs", [])
        try:
            self._instances = os.open("instances", os.O_RDONLY | os.O_DIRECTORY, dir_fd=mount_fd)
        finally:
            os.close(mount_fd)
        self.lock = threading.Lock()
        self._memory = mmap.mmap(-1, _READ + _NOTES * _NOTE.size)
        self._watches: list[Watch] = []
        self._expected: dict[int, Watch] = {}
        self._taken: dict[int, int] = {}
        self._pipe = -1
        self._switches: list[int] = []
        self._closing = False
        try:
            _remove_stale(self._instances)
            self.name = _make(self._instances)
        except OSError:
            os.close(self._instances)
            raise
        try:
            self._start()
        except OSError:
            self._remove()
            raise

    def watch(self, s_dev: int) -> Watch:
        """Collect the events of the superblock with device number `s_dev` (as os.makedev builds it) from now on."""
        with self.lock:
            watch = self._expected.pop(s_dev, None)
            if watch is None:
                watch = self._new(s_dev)
                self._collect_for([watch])
        return watch

    def expect(self, devices: Iterable[int]) -> None:
        """Collect for superblocks that are going to be watched, all at once: none is left out while others come."""
        with self.lock:
            if not self._memory[0]:  # another process may have died while it cleared what was handed out
                self._memory[:_READ] = bytes(_READ)
            expected = {s_dev: self._new(s_dev) for s_dev in devices}
            self._collect_for(expected.values())
            self._expected = expected

    def _collect_for(self, watches: Collection[Watch]) -> None:
        self._watches += watches
        try:
            self._filter()
        except OSError:
            del self._watches[-len(watches) :]
            raise

    def forget(self, watch: Watch) -> None:
        """Collect nothing for `watch` any more; with the last one, after `close`, remove the instance."""
        with self.lock:
            self._watches.remove(watch)
            if all(other.s_dev != watch.s_dev for other in self._watches):
                self._note(watch.s_dev, pending=False)
            if self._closing and not self._watches:
                self._remove()
            else:
                self._filter()

    def close(self) -> None:
        """Remove the instance: now, or when the last watch is forgotten (its flush may still be under way)."""
        with self.lock:
            self._closing = True
            if not self._watches:
                self._remove()

    def read(self) -> None:
        """Hand what is in the buffer out to the watches; the caller holds `lock`."""
        while True:
            if self._memory[0]:  # another process died with it
                text = self._memory[:_READ].partition(b"\0")[0]
            else:
                try:
                    with memoryview(self._memory) as room:
                        count = os.readv(self._pipe, [room[:_READ]])
                except BlockingIOError:
                    return
                if not count:  # somebody has switched the instance off (`keep_on`)
                    return
                text = self._memory[:count]
            for when, major, minor, ino in _EVENT.findall(text):
                s_dev, number, last = os.makedev(int(major), int(minor)), int(ino, 16), float(when)
                for watch in self._watches:
                    if watch.s_dev == s_dev:
                        earlier = watch.inodes.get(number)
                        watch.inodes[number] = Span(earlier.first if earlier else last, last)
            for watch in self._watches:
                if _LOST in text or len(watch.inodes) > MOST_INODES:
                    watch.lost = True
                    watch.inodes.clear()  # they are not all of it
                if watch.lost or watch.inodes:
                    self._note(watch.s_dev, pending=True)
            self._memory[: len(text)] = bytes(len(text))

    def keep_on(self) -> None:
        """Switch on what somebody has switched off: then events were lost. OSError if it cannot be; the caller holds
        `lock`.
        """
        if all(os.pread(fd, 1, 0) == b"1" for fd in self._switches):
            return
        for watch in self._watches:
            watch.lost = True
            watch.inodes.clear()
            self._note(watch.s_dev, pending=True)
        self._filter()  # who switches off may have cleared the rest
        self._switch_on()

    def taken(self, s_dev: int) -> int:
        """How often events of this superblock were taken."""
        with self.lock:
            return self._taken.get(s_dev, 0)

    def note_taken(self, s_dev: int) -> None:
        """Events of this superblock are taken; the caller holds `lock`."""
        self._taken[s_dev] = self._taken.get(s_dev, 0) + 1

    def kept(self, s_dev: int, taken: int) -> None:
        """What came of the first `taken` times is on record: if there were no more, no other process begins with it."""
        with self.lock:
            more = any(watch.lost or watch.inodes for watch in self._watches if watch.s_dev == s_dev)
            if not more and taken == self._taken.get(s_dev, 0):
                self._note(s_dev, pending=False)

    def _new(self, s_dev: int) -> Watch:
        watch = Watch(self, s_dev)
        watch.lost = self._noted(s_dev) >= 0
        return watch

    def _noted(self, s_dev: int) -> int:
        """Where in the memory this superblock is noted, or -1."""
        for at in range(_READ, len(self._memory), _NOTE.size):
            found = _NOTE.unpack_from(self._memory, at)[0]
            if found == s_dev:
                return at
            if not found:
                break
        return -1

    def _note(self, s_dev: int, *, pending: bool) -> None:
        at = self._noted(s_dev)
        if pending and at < 0:
            free = self._noted_end()
            if free < len(self._memory):
                _NOTE.pack_into(self._memory, free, s_dev)
        elif not pending and at >= 0:  # the last one takes its place
            last = self._noted_end() - _NOTE.size
            self._memory[at : at + _NOTE.size] = self._memory[last : last + _NOTE.size]
            _NOTE.pack_into(self._memory, last, 0)

    def _noted_end(self) -> int:
        at = _READ
        while at < len(self._memory) and _NOTE.unpack_from(self._memory, at)[0]:
            at += _NOTE.size
        return at

    def _start(self) -> None:
        each = min(_MOST_KIB_EACH, _TOTAL_KIB // (os.cpu_count() or 1))
        if each < _MOST_KIB_EACH:
            self._write("buffer_size_kb", str(each))
        self._filter()
        self._pipe = os.open(f"{self.name}/trace_pipe", os.O_RDONLY | os.O_NONBLOCK, dir_fd=self._instances)
        self._switch_on()
        for path in _SWITCHES:
            self._switches.append(os.open(f"{self.name}/{path}", os.O_RDONLY, dir_fd=self._instances))

    def _switch_on(self) -> None:
        self._write("trace_clock", "mono")
        for path in _SWITCHES:
            self._write(path, "1")

    def _remove(self) -> None:
        try:
            for fd in (self._pipe, *self._switches):
                if fd >= 0:
                    os.close(fd)
            os.rmdir(self.name, dir_fd=self._instances)
        finally:
            os.close(self._instances)

    def _write(self, path: str, text: str) -> None:
        fd = os.open(f"{self.name}/{path}", os.O_WRONLY, dir_fd=self._instances)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def _filter(self) -> None:
        devices = [os.major(s_dev) << 20 | os.minor(s_dev) for s_dev in {watch.s_dev for watch in self._watches}]
        words = " || ".join(f"s_dev == {device}" for device in devices or [0])
        self._write(f"{_POINT}/filter", words if len(words) < _FILTER_BYTES else "0")


def _make(instances: int) -> str:
    while True:
        name = f"overt-{os.getpid()}-{next(_numbers)}"
        try:
            os.mkdir(name, dir_fd=instances)
            return name
        except FileExistsError:  # another pid namespace has a process of this number
            continue


def _remove_stale(instances: int) -> None:
    for name in os.listdir(instances):
        owner = re.fullmatch(r"overt-(\d+)-\d+", name)
        if owner and not os.path.exists(f"/proc/{owner[1]}"):
            try:
                os.rmdir(name, dir_fd=instances)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EBUSY):  # somebody was faster, or it is in use
                    raise
