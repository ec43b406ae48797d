"""Closing descriptors of containers' files, on threads of their own: it may take for ever.

close(2) asks the file's filesystem (->flush), of an open file description that others have as well, too. An overlay
passes that on to the layer that the file is in (fs/overlayfs/file.c, ovl_flush), and a FUSE filesystem to its server,
which may be a container's own and never answer. Not even SIGKILL ends that (fs/fuse/dev.c, request_wait_answer).
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress


class Closer:
    """One thread at a time for each party, which ends when there is nothing left to close. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: dict[str, deque[tuple[int, Callable[[], object] | None]]] = {}
        self._busy: set[str] = set()

    def close(self, party: str, fd: int, then: Callable[[], object] | None = None) -> None:
        """Have `fd` closed after those that `party` has brought before, and `then` called. Waits for no filesystem."""
        with self._lock:
            self._left.setdefault(party, deque()).append((fd, then))
            if party in self._busy:
                return
            self._busy.add(party)
        try:
            threading.Thread(target=self._close, args=(party,), daemon=True).start()
        except RuntimeError:  # there can be no more threads: whatever the party brings next takes this along
            with self._lock:
                self._busy.discard(party)

    def _close(self, party: str) -> None:
        while True:
            with self._lock:
                if not self._left[party]:
                    del self._left[party]
                    self._busy.discard(party)
                    return
                fd, then = self._left[party].popleft()
            with suppress(OSError):  # of ->flush, for whoever wrote; it is closed all the same
                os.close(fd)
            if then is not None:
                then()
