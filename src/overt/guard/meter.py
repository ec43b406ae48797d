"""What the worker counts for whoever watches it: calls by how long they took, errors, and who was told.

It starts at nothing with each worker, as counters of a process do.
"""

import threading
import time
from bisect import bisect_left
from typing import Any

BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""seconds; a call is in the first bucket whose bound it does not exceed"""


class Meter:
    """See above. Any thread may call it."""

    def __init__(self) -> None:
        self.errors = 0
        """of uppers, as they became known"""
        self.told = 0
        self._calls = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0
        self._began: dict[int, tuple[float, int]] = {}
        """by slot: when, and the listener"""
        self._lock = threading.Lock()

    def begin(self, slot: int, listener: int) -> None:
        """A call was taken, which came by the listener with this number."""
        self._began[slot] = time.monotonic(), listener

    def end(self, slot: int) -> None:
        """It was answered, or nobody waits for it any more."""
        now = time.monotonic()
        began, _ = self._began.pop(slot, (now, 0))
        took = now - began
        with self._lock:
            self._calls[bisect_left(BOUNDS, took)] += 1
            self._seconds += took

    def longest(self) -> dict[int, float]:
        """Seconds since the oldest call was taken that waits for an answer, by listener."""
        now, found = time.monotonic(), dict[int, float]()
        for began, listener in list(self._began.values()):
            found[listener] = max(now - began, found.get(listener, 0.0))
        return found

    def describe(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        with self._lock:
            latency = {"bounds": list(BOUNDS), "calls": list(self._calls), "seconds": self._seconds}
        return {"errors": self.errors, "told": self.told, "latency": latency}
