"""Closing descriptors of containers' files, on threads of their own: it may take for ever.

close(2) asks the file's filesystem (->flush), of an open file description that others have as well, too. An overlay
passes that on to the layer that the file is in (fs/overlayfs/file.c, ovl_flush), and a FUSE filesystem to its server,
which may be a container's own and never answer. Not even SIGKILL ends that (fs/fuse/dev.c, request_wait_answer).

Nearly always it takes microseconds, and after an error there are a thousand at once. So one thread closes for all, and
another looks whether it gets on; if not, it takes over, and a further one looks. A party keeps one thread at most.

close(2) frees the number before it asks. So a file is first replaced by one that nobody has to be asked about (dup3(2)
closes what it replaces), and its number is free when that is done: whoever forks meanwhile knows which descriptors are
to be closed in the child as well (`left`), and that none of these numbers is another file's by then.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

_TICK = 0.02
"""seconds with a file after which somebody else closes the others'"""
_LINGER = 1.0
"""seconds that a thread waits for more"""


class Closer:
    """See above. Any thread may call."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left: dict[str, deque[tuple[int, Callable[[], object] | None]]] = {}
        self._turns: deque[str] = deque()
        """parties that have something left, and none of it is being closed"""
        self._idle = 0
        """threads that close nothing at present"""
        self._asleep = 0
        """those of them that wait until there is something to close"""
        self._busy: dict[int, float] = {}
        """the others, by their ids, and when each began with its file"""
        self._nothing = os.eventfd(0)
        """what a file is replaced by; open as long as the process lives"""

    def close(self, party: str, fd: int, then: Callable[[], object] | None = None) -> None:
        """Have `fd` closed after those that `party` has brought before, and `then` called. Waits for no filesystem."""
        with self._changed:
            if party not in self._left:
                self._left[party] = deque()
                self._turns.append(party)
            self._left[party].append((fd, then))
            if not self._idle:
                self._start()
            elif self._asleep:
                self._changed.notify()

    def left(self) -> list[tuple[str, int]]:
        """What is yet to be closed, by party, or being closed; in a child, where no thread of this is at work."""
        return [(party, fd) for party, files in self._left.items() for fd, _ in files]

    def _start(self) -> None:
        """Have one thread more. Where there can be none, whatever comes next tries again. Under the lock."""
        self._idle += 1
        try:
            threading.Thread(target=self._serve, daemon=True).start()
        except Exception:  # RuntimeError, MemoryError
            self._idle -= 1

    def _serve(self) -> None:
        with self._changed:
            try:
                while self._wait():
                    if time.monotonic() < max(self._busy.values(), default=0.0) + _TICK:
                        self._changed.wait(_TICK)  # somebody is at it, and gets on
                    else:
                        self._take_turn()
            finally:
                self._idle -= 1

    def _wait(self) -> bool:
        """Whether there is something to close, at once or soon. Under the lock."""
        if not self._turns:
            self._asleep += 1
            self._changed.wait_for(lambda: self._turns, _LINGER)
            self._asleep -= 1
        return bool(self._turns)

    def _take_turn(self) -> None:
        """Close one file of the party whose turn it is; under the lock, which is let go meanwhile."""
        party = self._turns.popleft()
        left = self._left[party]
        fd, then = left[0]
        self._idle -= 1
        self._busy[threading.get_ident()] = time.monotonic()
        if self._turns and not self._idle:
            self._start()
        self._changed.release()
        try:
            with suppress(OSError):  # of a number that RLIMIT_NOFILE does not allow by now
                os.dup2(self._nothing, fd, inheritable=False)
            left.popleft()
            with suppress(OSError):  # of ->flush then, for whoever wrote; it is closed all the same
                os.close(fd)
            if then is not None:
                then()
        finally:
            self._changed.acquire()
            self._idle += 1
            del self._busy[threading.get_ident()]
            if left:
                self._turns.append(party)
            else:
                del self._left[party]
