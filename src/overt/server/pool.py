"""Threads for work that blocks, started as they are needed.

concurrent.futures does the same with a future and two locks for each piece of work; nobody here waits for a future, and
handing work over is a good part of what an fsync of a clean file costs (docs/speed.md).
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from overt.host.process import set_filesystem_ids

Work = tuple[Callable[..., None], tuple[Any, ...]]


class Pool:
    """At most `limit` threads; they end with the process. A call must not raise, but report its failure itself."""

    def __init__(self, limit: int, name: str) -> None:
        self._limit = limit
        self._name = name
        self._queue: SimpleQueue[Work] = SimpleQueue()
        self._free = threading.Semaphore(0)
        self._threads = 0

    def submit(self, call: Callable[..., None], *arguments: Any) -> None:
        """Have a call made; any thread."""
        self._queue.put((call, arguments))
        if not self._free.acquire(blocking=False) and self._threads < self._limit:
            self._threads += 1
            threading.Thread(target=self._labour, name=f"{self._name}-{self._threads}", daemon=True).start()

    def _labour(self) -> None:
        set_filesystem_ids(0, 0)  # a thread inherits those of the one that started it
        get, free = self._queue.get, self._free.release
        while True:
            call, arguments = get()
            call(*arguments)
            free()
