"""Everything that an operator should know of: one JSON object a line, and a record that `overt status` shows."""

import atexit
import errno
import json
import os
import select
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

_KEPT = 1000
_PAUSE = 0.01
"""seconds between two attempts to write what nobody reads"""
_PATIENCE = 1.0
"""seconds that a process which ends waits for whoever is to read what it said"""
_SYSLOG = "/dev/log"
_USER_INFO = 14
"""facility and severity, syslog(3)"""


class Events:
    """The event log of one process. Any thread may call it."""

    def __init__(self, *, foreground: bool) -> None:
        """In the foreground lines go to standard error, otherwise to syslog(3)."""
        self.record: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self.counts: dict[str, int] = {}
        self.crashes = 0
        self._write = writer(foreground=foreground)

    def say(self, event: str, **details: object) -> None:
        """Record an event; `details` must be what JSON can hold."""
        entry = {"time": round(time.time(), 6), "event": event, **details}
        self.record.append(entry)
        self.counts[event] = self.counts.get(event, 0) + 1
        self._write(json.dumps(entry))

    def crash(self, doing: str) -> None:
        """Record an exception that should not be: the request is failed, the trace is kept."""
        self.crashes += 1
        self.say("internal error", doing=doing, trace=traceback.format_exc())


def writer(*, foreground: bool) -> Callable[[str], None]:
    """What writes a line, and waits for nobody: to standard error in the foreground, otherwise as syslog(3) does."""
    return _Log(_Stderr() if foreground else _Syslog()).say


def leave(status: int) -> NoReturn:
    """os._exit, but what was said is written first, as far as somebody reads it."""
    try:
        _flush()
    finally:
        os._exit(status)


class _Stderr:
    def frame(self, line: str) -> bytes:
        return f"{line}\n".encode()

    def write(self, data: bytes) -> int:
        """In one piece, if there is room: other processes write too. Not by sys.stderr, which keeps what it could not.

        O_NONBLOCK would be theirs as well. Terminals, most files, and pipes before Linux 6.5 know no RWF_NOWAIT.
        """
        try:
            return os.pwritev(2, [data], -1, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EAGAIN):
                raise
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        if not poll.poll(0):
            raise BlockingIOError
        return os.write(2, data)


class _Syslog:
    """Not by syslog(3), which waits for the daemon, under a lock that is left locked in the child of a fork."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def frame(self, line: str) -> bytes:
        return f"<{_USER_INFO}>{time.strftime('%b %e %T')} overt: {line}".encode()

    def write(self, data: bytes) -> int:
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            raise
        except OSError:  # not connected yet, or the daemon was started again
            self._socket.connect(_SYSLOG)
            return self._socket.send(data, socket.MSG_DONTWAIT)


class _Log:
    """Lines on their way out, in their order. Nobody waits for who reads them: that one may wait for a disk that hangs.

    He may have gone, too, or his disk be full. That is no failure of what is said, least of all of a request in whose
    midst it is said; and there is nowhere left to say so.
    """

    def __init__(self, to: _Stderr | _Syslog) -> None:
        self._to = to
        self.begin()
        _logs.append(self)

    def begin(self) -> None:
        """In the child of a fork, too: what waits is its parent's to write, and threads of its parent had the lock."""
        self._lock = threading.RLock()  # a signal handler may say something in the midst of it
        self._waiting: deque[bytes] = deque()
        self._dropped = 0
        self._tries_again = False

    def say(self, line: str) -> None:
        """Write a line now, or as soon as it can be written."""
        with self._lock:
            if len(self._waiting) < _KEPT:
                self._waiting.append(self._to.frame(line))
            else:
                self._dropped += 1
            if self._drain() or self._tries_again:
                return
            try:
                threading.Thread(target=self._try_again, daemon=True).start()
                self._tries_again = True
            except RuntimeError:  # no more threads: with the next line, or at the end
                pass

    def flush(self, until: float) -> None:
        """Write what waits, until then (time.monotonic) at most."""
        while not self._drain() and time.monotonic() < until:
            time.sleep(_PAUSE)

    def _try_again(self) -> None:
        while True:
            time.sleep(_PAUSE)
            with self._lock:
                if self._drain():
                    self._tries_again = False
                    return

    def _drain(self) -> bool:
        """Write what can be written at once; whether that is all."""
        with self._lock:
            while self._waiting or self._dropped:
                if not self._waiting:
                    said = {"time": round(time.time(), 6), "event": "lines left out", "number": self._dropped}
                    self._waiting.append(self._to.frame(json.dumps(said)))
                    self._dropped = 0
                data = self._waiting.popleft()
                try:
                    rest = data[self._to.write(data) :]
                except BlockingIOError:
                    self._waiting.appendleft(data)
                    return False
                except OSError:
                    continue
                if rest:
                    self._waiting.appendleft(rest)
        return True


_logs: list[_Log] = []


def _begin() -> None:
    for log in _logs:
        log.begin()


@atexit.register
def _flush() -> None:
    until = time.monotonic() + _PATIENCE
    for log in _logs:
        log.flush(until)


os.register_at_fork(after_in_child=_begin)
