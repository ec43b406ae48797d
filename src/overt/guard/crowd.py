"""A crowd: many containers that call at the same moment, as when an engine stops them all.

The flush of a clean disk takes microseconds, so it is over before the next of a thousand callers has got as far as its
call, and a thousand calls would be hundreds of flushes. So when containers come that were not heard of for a while, and
several of them within milliseconds, their calls are gathered until no further one comes; one flush does for all.

Who calls again and again is no newcomer and waits for nobody, however many do so; nor do the first of a crowd.
"""

import threading
import time
from collections import deque
from collections.abc import Callable

from overt.upper.flusher import Done

_FORGOTTEN = 0.05
"""seconds after which a listener is a newcomer again"""
_SEVERAL = 3
_TOGETHER = 0.05
"""so many newcomers within so many seconds are a crowd"""
_QUIET = (0.005, 0.02)
"""seconds without a further call after which a crowd is complete: one that is small, and one of _LARGE or more"""
_LARGE = 16
_MOST = 0.3
"""seconds that a call is held up, at most"""


class Crowd:
    """The callers of one upper. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._heard: dict[int, float] = {}
        self._came: deque[float] = deque(maxlen=_SEVERAL)
        self._last = 0.0
        self._gathered: list[Done] | None = None

    def gather(self, listener: int, done: Done, flush: Callable[..., None]) -> bool:
        """Keep `done`, of a call by `listener`, for the flush that is for all; False if it is to have its own.

        `flush` is called on another thread with everything that was gathered.
        """
        now = time.monotonic()
        with self._lock:
            newcomer = now - self._heard.get(listener, 0.0) > _FORGOTTEN
            self._heard[listener] = self._last = now
            if self._gathered is not None:
                self._gathered.append(done)
                return True
            if not newcomer:
                return False
            self._came.append(now)
            if len(self._came) < _SEVERAL or now - self._came[0] > _TOGETHER:
                return False
            self._gathered = [done]
        threading.Thread(target=self._wait, args=(now + _MOST, flush), daemon=True).start()
        return True

    def forget(self, listener: int) -> None:
        """A listener has ended."""
        with self._lock:
            self._heard.pop(listener, None)

    def _complete(self) -> float:
        return self._last + _QUIET[len(self._gathered or ()) >= _LARGE]

    def _wait(self, until: float, flush: Callable[..., None]) -> None:
        while (pause := min(self._complete(), until) - time.monotonic()) > 0:
            time.sleep(pause)
        with self._lock:
            gathered, self._gathered = self._gathered or [], None
        flush(*gathered)
