"""Coalescing: any number of callers who want a flush, one thread that flushes.

    asked for   a b c        d e f g
    flushes     |--- 1 ---|  |--- 2 ---|
    answered              a            b c d e f g     (b and c came while 1 was under way)

A flush may have passed a page by before the caller wrote it, so a caller who comes while one is under way is answered
by the next, which begins after the call. However many call at once, that makes two flushes.
"""

import errno
import logging
import os
import threading
from collections.abc import Callable

from overt.host import process

Done = Callable[[OSError | None], None]

_log = logging.getLogger(__name__)


class Flusher:
    """A thread, started when it is first needed, that calls `flush` for all who are waiting."""

    def __init__(self, flush: Callable[[], OSError | None], name: str) -> None:
        self._flush = flush
        self._name = name
        self._waiting: list[Done] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._busy = False
        self._closed = False
        self._after: Callable[[], None] | None = None

    def ask(self, *done: Done) -> None:
        """Have each `done` called, on the flusher's thread, with the outcome of a flush that has yet to begin."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the flusher was closed")
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()  # RuntimeError if there can be no more: then nobody waits
                self._thread = thread
            self._waiting += done
            self._changed.notify()

    def ask_here(self, done: Done) -> bool:
        """Flush on the calling thread and call `done` there; False, and nothing is done, if others are at it.

        It spares two changes of threads; who cannot wait for a disk has to `ask`.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the flusher was closed")
            if self._busy or self._waiting:
                return False
            self._busy = True
        self._serve([done])
        with self._changed:
            self._busy = False
            if self._waiting or self._closed:  # somebody came meanwhile: to wake the thread for nothing costs as much
                self._changed.notify()
            ended = self._after if self._closed and self._thread is None else None
        if ended:
            ended()
        return True

    def close(self, after: Callable[[], None]) -> None:
        """Serve who is waiting, end the thread, and call `after`: on the thread if it is busy, here otherwise.

        Does not wait for a flush: a disk that hangs must not hang whoever unmounts.
        """
        with self._changed:
            self._closed = True
            if self._busy or self._waiting:
                self._after = after
                return
            self._changed.notify()
        if self._thread:
            self._thread.join()
        after()

    def _run(self) -> None:
        # A thread inherits its maker's filesystem ids, and whoever asks first may be acting as some user.
        process.set_filesystem_ids(os.geteuid(), os.getegid())
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._busy and (self._waiting or self._closed))
                waiting, self._waiting = self._waiting, []
                self._busy = bool(waiting)
            if not waiting:
                break
            self._serve(waiting)
            with self._changed:
                self._busy = False
        if self._after:
            self._after()

    def _serve(self, waiting: list[Done]) -> None:
        """Flush, and tell who waits for it."""
        try:
            failure = self._flush()
        except Exception as error:
            _log.exception("%s: a flush ended in a way it must not", self._name)
            failure = OSError(errno.EIO, str(error))
        for done in waiting:
            try:
                done(failure)
            except Exception:  # the others are to be answered all the same
                _log.exception("%s: could not hand over an answer", self._name)
