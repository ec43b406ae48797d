"""What is kept of each upper: its eyes, which go on by themselves; its errors, before anybody is told of the newest."""

import os
import threading

from overt.guard.store import Keeper
from overt.upper import Upper
from overt.upper.trace import Trace


class Records:
    """Has the supervisor keep it. Any thread may call any method: what is kept last is never older than before."""

    def __init__(self, keeper: Keeper, trace: Trace | None) -> None:
        self._keeper = keeper
        self._trace = trace
        self._lock = threading.Lock()
        self._kept: dict[int, Upper] = {}

    def keep(self, upper: Upper | None) -> None:
        """Keep it as it is now; nothing to do where it has no overlays any more."""
        if upper is None:
            return
        with self._lock:
            taken = self._trace.taken(upper.s_dev) if self._trace else 0
            carried = upper.carry()  # waits for whoever has taken events to have recorded what came of them
            if carried is None:
                return
            eyes = carried[:3]
            try:
                value = {
                    "fds": [fd >= 0 for fd in eyes], "accepted": carried.accepted, "known": carried.known,
                    "born_read_only": carried.born_read_only, "errors": list(upper.ledger.errors),
                }  # fmt: skip
                self._keeper.put(f"upper/{upper.s_dev}", value, [fd for fd in eyes if fd >= 0])
                self._kept[upper.s_dev] = upper
                if self._trace:
                    self._trace.kept(upper.s_dev, taken)
            finally:
                for fd in eyes:
                    if fd >= 0:
                        os.close(fd)

    def drop(self, upper: Upper) -> None:
        """Forget an upper that has no overlays any more; not one that has come in its place."""
        with self._lock:
            if self._kept.get(upper.s_dev, upper) is upper:
                self._kept.pop(upper.s_dev, None)
                self._keeper.drop(f"upper/{upper.s_dev}")
