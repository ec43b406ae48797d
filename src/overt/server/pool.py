"""Threads for work that blocks, started as they are needed.

concurrent.futures does the same with a future and two locks for each piece of work; nobody here waits for a future, and
handing work over costs more than an fsync of a clean file (docs/speed.md).
"""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from overt.host.process import set_filesystem_ids

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
        self._free = threading.Semaphore(0)
        self._threads = 0

    def submit(self, call: Callable[..., None], *arguments: Any) -> None:
        """Have a call made; any thread."""
        self._queue.put((call, arguments))
        if not self._free.acquire(blocking=False) and self._threads < self._limit:
            self._threads += 1
            threading.Thread(target=self._labour, name=f"{self._name}-{self._threads}", daemon=True).start()

    def work(self, call: Callable[..., None], *arguments: Any) -> None:
        """Make a call on this thread."""
        begin = time.monotonic()
        call(*arguments)
        self.quick = time.monotonic() - begin < _SHORT

    def close(self) -> None:
        """End the threads, each when it has done what it is doing; nothing is submitted after this."""
        for _ in range(self._threads):
            self._queue.put(None)

    def _labour(self) -> None:
        set_filesystem_ids(0, 0)  # a thread inherits those of the one that started it
        get, free = self._queue.get, self._free.release
        while work := get():
            call, arguments = work
            self.work(call, *arguments)
            free()
