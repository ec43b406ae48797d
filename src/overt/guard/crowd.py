"""A crowd: many containers that call at the same moment, as when an engine stops them all.

The flush of a clean disk takes microseconds, so it is over before the next of a thousand callers has got as far as its
call, and a thousand calls would be hundreds of flushes. So where calls of newcomers, containers that were not heard of
for seconds, come densely, they are gathered for a window, and one flush does for all. No call extends a window. It is a
short one, so that those whom chance brings together hardly wait; longer ones follow only while each brings so many that
it can be nothing but a crowd, and begin at once for those who come right after a crowd.

Who calls again and again, were it once a second, is no newcomer and waits for nobody; nor do the first of a crowd.
"""

import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from overt.upper.flusher import Done

_FORGOTTEN = 2.0
"""seconds after which a listener is a newcomer again"""
_SHORT, _LONG = 0.005, 0.05
"""seconds of a window"""
_DENSE = 3
"""so many newcomers within the seconds of a short window, and the last begins one"""
_MORE = 16
"""so many in a window, and a long one follows"""
_MOST = 0.25
"""seconds that a call is held up, at most"""
_LARGE = 64
_AFTERWARDS = 0.25
"""seconds after a crowd of so many in which those who come are its last"""

_log = logging.getLogger(__name__)


class Crowd:
    """The callers of one upper. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._heard: dict[int, float] = {}
        self._came: deque[float] = deque(maxlen=_DENSE)
        self._ended = -_AFTERWARDS
        self._gathered: list[Done] | None = None

    def gather(self, listener: int, done: Done, flush: Callable[..., None]) -> bool:
        """Keep `done`, of a call by `listener`, for the flush that is for all; False if it is to have its own.

        `flush` is called on another thread with everything that was gathered; if it raises, each is given an EIO.
        """
        now = time.monotonic()
        with self._lock:
            newcomer = now - self._heard.get(listener, -_FORGOTTEN) >= _FORGOTTEN
            self._heard[listener] = now
            if not newcomer:
                return False
            if self._gathered is not None:
                self._gathered.append(done)
                return True
            self._came.append(now)
            if now - self._ended < _AFTERWARDS:
                window = _LONG
            elif len(self._came) == _DENSE and now - self._came[0] <= _SHORT:
                window = _SHORT
            else:
                return False
            try:
                threading.Thread(target=self._wait, args=(now, window, flush), daemon=True).start()
            except RuntimeError:  # there can be no more threads
                return False
            self._gathered = [done]
        return True

    def forget(self, listener: int) -> None:
        """A listener has ended."""
        with self._lock:
            self._heard.pop(listener, None)

    def _wait(self, begun: float, window: float, flush: Callable[..., None]) -> None:
        end, before = begun + window, 0
        while True:
            time.sleep(max(0.0, end - time.monotonic()))
            with self._lock:
                gathered = self._gathered or []
                if len(gathered) - before < _MORE or end >= begun + _MOST:
                    self._gathered = None
                    if len(gathered) >= _LARGE:
                        self._ended = time.monotonic()
                    break
                before, end = len(gathered), min(end + _LONG, begun + _MOST)
        try:
            flush(*gathered)
        except Exception as error:  # the last container on this upper has ended meanwhile
            _log.exception("no flush for %d calls that were gathered", len(gathered))
            for done in gathered:
                done(OSError(errno.EIO, str(error)))
