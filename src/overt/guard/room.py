"""How many descriptors containers may make the guard hold, so that there are always some for further containers.

A description that is owed an error takes one in the worker and one in the supervisor; an overlay takes a few. Who opens
thousands of files, or mounts thousands of overlays, is at the end of a share of its own: what it cannot be told exactly
it is told once too often.
"""

import resource
import threading
from collections import Counter

_MOST_OVERLAYS = 1024
_FDS_OF_AN_OVERLAY = 8
"""in one process, at most"""


class Room:
    """Shares of RLIMIT_NOFILE. Any thread may call any method. A party is a container, by its id."""

    def __init__(self, descriptors: int | None = None) -> None:
        """`descriptors`: how many this process can have, by default the soft limit."""
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if descriptors is None else descriptors
        self.overlays = max(1, min(_MOST_OVERLAYS, most // 8 // _FDS_OF_AN_OVERLAY))
        """of one listener's"""
        self._all = most // 2
        self._each = most // 16
        self._taken: Counter[tuple[str, bool]] = Counter()
        self._lock = threading.Lock()

    def take(self, party: str, *, told: bool = False) -> bool:
        """Take room for a description; False if there is none. `told`: it was told, and a quarter more is for those."""
        with self._lock:
            full = self._taken[party, told] >= (self._each // 4 if told else self._each)
            if full or self._taken.total() >= self._all:
                return False
            self._taken[party, told] += 1
            return True

    def give(self, party: str, *, told: bool = False) -> None:
        """It is let go."""
        with self._lock:
            self._taken[party, told] -= 1
            self._taken += Counter()  # without those who have nothing
