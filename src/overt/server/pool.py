"""Threads for work that blocks, started as they are needed.

concurrent.futures does the same with a future and two locks for each piece of work; nobody here waits for a future, and
handing work over costs more than an fsync of a clean file (docs/speed.md).
"""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from overt.host import process
from overt.server import identity

Work = tuple[Callable[..., None], tuple[Any, ...]]

_SHORT = 3e-4
"""seconds"""


class Pool:
    """At most `limit` threads, until `close`. A call must not raise, but report its failure itself."""

    def __init__(self, limit: int, name: str) -> None:
        self.quick = True
        """whether the last work took so little time that handing it over would have taken longer"""
        self._limit = limit
        self._name = name
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._spare = 0
        """threads less pieces of work, those that wait in line included"""

    @property
    def short(self) -> bool:
        """Whether work waits in line for a thread."""
        return self._spare < 0

    def submit(self, call: Callable[..., None], *arguments: Any) -> None:
        """Have a call made; any thread. OSError (EAGAIN) if there is no thread for it, and can be none.

        Where there are others, but no more, it is made when one of them is free.
        """
        with self._lock:
            if self._spare <= 0:
                self._hire()
            self._spare -= 1
            self._queue.put((call, arguments))

    def see_to(self, call: Callable[..., None], *arguments: Any) -> None:
        """The same, but on this thread if there is no other and can be none."""
        try:
            self.submit(call, *arguments)
        except OSError:
            identity.become_root()
            self.work(call, *arguments)

    def replenish(self) -> None:
        """Start a thread for what waits in line, if there can be one again; any thread."""
        with self._lock:
            if self._spare < 0:
                self._hire()

    def work(self, call: Callable[..., None], *arguments: Any) -> None:
        """Make a call on this thread."""
        begin = time.monotonic()
        call(*arguments)
        self.quick = time.monotonic() - begin < _SHORT

    def close(self) -> None:
        """End the threads, each when it has done what it is doing; nothing is submitted after this."""
        for _ in range(self._threads):
            self._queue.put(None)

    def _hire(self) -> None:
        if self._threads == self._limit:
            return
        try:
            process.start(threading.Thread(target=self._labour, name=f"{self._name}-{self._threads + 1}", daemon=True))
        except OSError:
            if not self._threads:
                raise
        else:
            self._threads += 1
            self._spare += 1

    def _labour(self) -> None:
        process.set_filesystem_ids(0, 0)  # a thread inherits those of the one that started it
        get, lock = self._queue.get, self._lock
        while work := get():
            call, arguments = work
            self.work(call, *arguments)
            with lock:
                self._spare += 1
