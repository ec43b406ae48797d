"""One epoll loop, whose leader is replaced when it is kept.

Handing a call over to another thread and its answer back costs more than the flush of a clean disk. So whoever leads
the loop does by itself what can take long, inside `long`. If it is not back within a few milliseconds, the deputy
takes over the loop and makes itself a deputy; the old leader, when it comes back, finds itself deposed, finishes its
call and ends.

The deputy sleeps while nobody calls, and looks every two milliseconds while somebody does.
"""

import os
import select
import threading
import time
import traceback
from collections.abc import Callable

from overt.events import leave, writer

_TICK = 0.002
"""seconds between two looks of the deputy's"""
_QUIET = 0.1
"""seconds without a call after which it sleeps"""


class Loop:
    """See above."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._on: dict[int, Callable[[int], object]] = {}
        self._leader = 0
        self._turn = threading.Lock()
        self._long = 0  # the number of what the leader is at, 0: nothing that takes long
        self._count = 0
        self._last = 0.0
        self._asleep = False
        self._then = 0.0
        """when `each` is due: whoever leads by then, for leaders may follow one another faster than that"""
        self._work = threading.Event()
        self._ended = threading.Event()
        self._woken, self.bell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        """a byte written to `bell` wakes the loop: for signal.set_wakeup_fd, since any thread may get the signal"""
        self._stopping = False
        self.watch(self._woken, lambda _: os.read(self._woken, 64))

    def watch(self, fd: int, act: Callable[[int], object]) -> None:
        """Have `act` called, with the EPOLL* bits, while `fd` is readable or hung up."""
        self._on[fd] = act
        self._epoll.register(fd, select.EPOLLIN)

    def pause(self, fd: int, *, paused: bool = True) -> None:
        """Look for nothing but the end of `fd`; or, not `paused`, for input again."""
        self._epoll.modify(fd, 0 if paused else select.EPOLLIN)

    def forget(self, fd: int) -> None:
        """The opposite of `watch`; before `fd` is closed."""
        self._on.pop(fd, None)
        self._epoll.unregister(fd)

    def may_take_long(self) -> bool:
        """Whether the caller leads the loop, inside `long`, and nothing else is ready: then it may wait for a disk."""
        return self._leader == threading.get_ident() and bool(self._long) and not self._epoll.poll(0, 1)

    def run(self, period: float, each: Callable[[], None]) -> None:
        """Serve until `stop`, calling `each` about every `period` seconds."""
        self._then = time.monotonic() + period
        self._appoint(period, each)
        self._lead(period, each)
        while not self._ended.wait(1.0):  # deposed; signals are handled on this thread all the same
            continue

    def stop(self) -> None:
        """End `run`. On any thread, and in signal handlers."""
        self._stopping = True
        os.write(self.bell, b"\0")

    def _lead(self, period: float, each: Callable[[], None]) -> None:
        me = self._leader = threading.get_ident()
        while not self._stopping:
            for fd, what in self._epoll.poll(period):
                act = self._on.get(fd)
                if act is not None:
                    act(what)
                if self._leader != me:  # the rest is the new leader's, who sees it again
                    return
            if time.monotonic() >= self._then:
                self._then = time.monotonic() + period
                each()
        self._ended.set()

    def long(self, act: Callable[[], None]) -> None:
        """Call `act`, which may take any time; for the leader."""
        self._last = time.monotonic()
        with self._turn:
            self._count += 1
            mine = self._long = self._count
        if self._asleep:
            self._work.set()
        try:
            act()
        finally:
            with self._turn:
                if self._long == mine:  # else the deputy leads, and may be at something long itself
                    self._long = 0

    def _quiet(self) -> bool:
        return time.monotonic() - self._last > _QUIET and not self._long

    def _appoint(self, period: float, each: Callable[[], None]) -> None:
        threading.Thread(target=self._deputise, args=(period, each), daemon=True).start()

    def _deputise(self, period: float, each: Callable[[], None]) -> None:
        seen = 0
        while not self._ended.is_set():
            if self._quiet():
                self._asleep = True
                if self._quiet():  # what begins after this look finds it asleep
                    self._work.wait()
                self._asleep = False
                self._work.clear()
            time.sleep(_TICK)
            with self._turn:
                deposed = self._long and self._long == seen
                seen = self._long
                if deposed:
                    try:
                        self._appoint(period, each)
                    except (RuntimeError, MemoryError):  # no more threads: at the next look
                        continue
                    self._leader = threading.get_ident()
                    self._long = 0
            if deposed:
                try:
                    self._lead(period, each)
                except BaseException:
                    writer(foreground=True)(traceback.format_exc())
                    leave(1)  # a process without its loop is worse than none
                return
