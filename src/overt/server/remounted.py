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
                self._tried = {mount: number for mount, number in self._tried.items() if mount.remounted}
                held = [mount for mount in self._tried if mount.begin()]
                if not held:
                    self._tried = {}
                    return
            for upper in {mount.upper for mount in held}:
                if upper is not None:
                    upper.check()
            for mount in held:
                self._look(mount)

    def _look(self, mount: Mount) -> None:
        """Once for each error: what does not go now, goes later on by the next error, or not at all."""
        owed = mount.account.owed() if mount.account is not None else None
        if owed is not None and owed.number > self._tried[mount]:
            self._tried[mount] = owed.number
            mount.pool.submit(carry_over, mount)
        else:
            mount.end()
