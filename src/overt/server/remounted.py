"""Mounts that somebody has remounted. If one is read-only now, the kernel does not ask: errors have to come to it."""

import threading
import time
from typing import NamedTuple

from overt.server.mount import Mount
from overt.server.syncing import carry_over

_LOOK = 0.01
"""seconds between two looks at their uppers"""
_PAUSE, _LONGEST = 0.1, 60.0
"""seconds between two attempts to tell of the same error: at first, and at most"""


class _Attempt(NamedTuple):
    """An error that was to be carried over to a mount."""

    number: int
    again: float
    """when it may be tried again, if it is still owed"""
    pause: float


_NONE = _Attempt(0, 0.0, 0.0)


class Remounted:
    """Looks after them while there are any, on a thread of its own."""

    def __init__(self) -> None:
        self._tried: dict[Mount, _Attempt] = {}
        self._lock = threading.Lock()

    def add(self, mount: Mount) -> None:
        """Look after `mount`, until the kernel asks again or it is gone. Any thread."""
        with self._lock:
            idle = not self._tried
            self._tried.setdefault(mount, _NONE)
        if idle:
            threading.Thread(target=self._look_after, daemon=True).start()

    def _look_after(self) -> None:
        while True:
            time.sleep(_LOOK)
            with self._lock:
                held = [mount for mount in self._tried if mount.remounted and mount.begin()]
                self._tried = {mount: self._tried[mount] for mount in held}
                if not held:
                    return
            for mount in held:
                try:
                    self._look(mount)
                except Exception:
                    mount.events.crash(f"looking after {mount.target}")
                mount.end()

    def _look(self, mount: Mount) -> None:
        if mount.upper is None or mount.account is None:
            return
        mount.upper.check()
        owed = mount.account.owed()
        if owed is None:
            return
        last, now = self._tried[mount], time.monotonic()
        pause = _PAUSE if owed.number > last.number else min(2 * last.pause, _LONGEST)
        if (owed.number > last.number or now > last.again) and mount.begin():
            self._tried[mount] = _Attempt(owed.number, now + pause, pause)
            mount.pool.submit(carry_over, mount)
