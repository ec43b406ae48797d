"""Calls that are being answered, in memory that outlives the worker.

A notification that was received is not handed out again: if the worker died with it, the caller would wait for ever.
So it is received straight into a page that the supervisor shares. The kernel finishes that ioctl before a SIGKILL takes
effect, so that there is no moment at which a notification is in nobody's hands.

A slot is free, or belongs to a listener; it is written before the notification, and freed after the answer. The next
worker begins with the slots that are not free: those that still wait are answered anew, from the beginning.
"""

import ctypes
import mmap
import struct
import threading
from collections.abc import Iterator
from typing import NamedTuple

from overt.wire.record import size_of, struct_of
from overt.wire.seccomp import SeccompNotif

COUNT = 1 << 16
"""how many calls can be under way at the same time"""
_HEAD = struct.Struct("=IiII")  # listener, told, attempts, unused
_SIZE = 128
_NOTIFICATION = struct_of(SeccompNotif)
_EMPTY = bytes(_SIZE)
assert _HEAD.size + size_of(SeccompNotif) <= _SIZE


class Notification(NamedTuple):
    """What is needed of a struct seccomp_notif."""

    id: int
    tid: int
    number: int
    arch: int
    argument: int
    """the first, as the 32-bit int that a descriptor is"""


class Slots:
    """The table; made by the supervisor, used by one worker after the other. Any thread may call any method."""

    def __init__(self, count: int = COUNT) -> None:
        self.count = count
        self._memory = mmap.mmap(-1, count * _SIZE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._lock = threading.Lock()
        self._free: list[int] = []
        self._fresh = 0

    def take(self, listener: int) -> int:
        """A slot for a call that came by the listener with this number (above 0); -1 if there is none."""
        with self._lock:
            if self._free:
                slot = self._free.pop()
            elif self._fresh < self.count:
                slot = self._fresh
                self._fresh += 1
            else:
                return -1
        _HEAD.pack_into(self._memory, slot * _SIZE, listener, 0, 0, 0)
        return slot

    def address(self, slot: int) -> int:
        """Where the kernel is to write the notification."""
        return self._address + slot * _SIZE + _HEAD.size

    def read(self, slot: int) -> Notification:
        """The notification in a slot."""
        number, tid, _, nr, arch, _, fd, *_ = _NOTIFICATION.unpack_from(self._memory, slot * _SIZE + _HEAD.size)
        return Notification(number, tid, nr, arch, fd & 0xFFFFFFFF)

    def telling(self, slot: int, error: int) -> None:
        """Note that the caller is about to be told of an error; until `free` nobody knows whether it was."""
        listener, _, attempts, _ = _HEAD.unpack_from(self._memory, slot * _SIZE)
        _HEAD.pack_into(self._memory, slot * _SIZE, listener, error, attempts, 0)

    def free(self, slot: int) -> None:
        """The call was answered, or is gone."""
        self._memory[slot * _SIZE : (slot + 1) * _SIZE] = _EMPTY
        with self._lock:
            self._free.append(slot)

    def left(self) -> Iterator[tuple[int, int, int, int]]:
        """What a worker before this one left: (slot, listener, error it was telling or 0, how often it was left).

        To be called before the first `take`.
        """
        for slot in range(self.count):
            listener, telling, attempts, _ = _HEAD.unpack_from(self._memory, slot * _SIZE)
            if listener:
                self._fresh = slot + 1
        self._free = [slot for slot in range(self._fresh) if not self._listener(slot)]
        for slot in range(self._fresh):
            listener, telling, attempts, _ = _HEAD.unpack_from(self._memory, slot * _SIZE)
            if listener:
                _HEAD.pack_into(self._memory, slot * _SIZE, listener, telling, attempts + 1, 0)
                yield slot, listener, telling, attempts + 1

    def _listener(self, slot: int) -> int:
        return int(_HEAD.unpack_from(self._memory, slot * _SIZE)[0])
