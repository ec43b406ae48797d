"""Everything that an operator should know of: one JSON object a line, and a record that `overt status` shows."""

import contextlib
import json
import os
import syslog
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

_KEPT = 1000


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
    """What writes a line: to standard error in the foreground, otherwise to syslog(3)."""
    return _to_stderr if foreground else syslog.syslog


def _to_stderr(line: str) -> None:
    """In one piece: other threads write too.

    Who reads it may have gone, or its disk be full. That is no failure of what is said, least of all of a request in
    whose midst it is said; and there is nowhere left to say so. Not by sys.stderr, which keeps what it could not write.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
