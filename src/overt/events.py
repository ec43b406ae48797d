"""Everything that an operator should know of: one JSON object a line, and a record that `overt status` shows."""

import json
import sys
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
        self._write: Callable[[str], None] = _to_stderr if foreground else syslog.syslog

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


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")  # in one piece: other threads write too
    sys.stderr.flush()
