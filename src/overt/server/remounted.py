"""Mounts that somebody has remounted. If one is read-only now, the kernel does not ask: errors have to come to it."""

import threading
import time

from overt.server.mount import Mount
from overt.server.syncing import carry_over

_LOOK = 0.01
"""seconds between two looks at their uppers"""


class Remounted:
    """Looks after them while there are any, on a thread of its own."""

    def __init__(self) -> None:
        self._tried: dict[Mount, int] = {}
        """the number of the last error that was carried over to each, or could not be"""
        self._lock = threading.Lock()

    def add(self, mount: Mount) -> None:
        """Look after `mount`, until the kernel asks again or it is gone. Any thread."""
        with self._lock:
            idle = not self._tried
            self._tried.setdefault(mount, 0)
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
        """Each error is tried once: the next one, or the next remount, takes along what did not go."""
        if mount.upper is None or mount.account is None:
            return
        mount.upper.check()
        owed = mount.account.owed()
        if owed is not None and owed.number > self._tried[mount] and mount.begin():
            self._tried[mount] = owed.number
            mount.pool.submit(carry_over, mount)
