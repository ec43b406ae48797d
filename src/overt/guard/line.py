"""A line: things that a few threads at a time do, and that nobody waits for.

Whoever brings one does it, and then those of others who came meanwhile, unless enough are at it already. So however
many come, they take no more than those few threads' share of the processor.
"""

import threading
from collections import deque
from collections.abc import Callable


class Line:
    """See above; `most` threads at a time. Any thread may call `do`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._busy = 0

    def do(self, act: Callable[[], None]) -> None:
        """Have `act`, which raises nothing, called: here, or by another thread when it is its turn."""
        with self._lock:
            self._waiting.append(act)
            if self._busy >= self._most:
                return
            self._busy += 1
        while True:
            with self._lock:
                if not self._waiting:
                    self._busy -= 1
                    return
                act = self._waiting.popleft()
            act()
