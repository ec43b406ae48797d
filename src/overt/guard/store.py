"""What the supervisor keeps for the worker: named entries, each a few bytes of JSON and descriptors.

The worker sends, over one SOCK_SEQPACKET pair, what the next worker will need. A message that was sent arrives,
whatever becomes of the sender; so `put` needs no answer. The next worker is a fork and finds the entries in its memory.

    listener/N   the OCI process state, and the listener      (put by the supervisor itself)
    upper/DEV    errors, and the eyes' descriptors            overlay/DEV/TIME  its account, and its directories
    owed/DEV/TIME/N   an open file description that is yet to be told

The names, and what is in an entry, are the worker's business.
"""

import json
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

from overt.guard.closing import Closer

MESSAGE = 1 << 17
"""bytes, at most"""
MOST_FDS = 16
"""with one message"""


class Entry(NamedTuple):
    """One entry."""

    value: Any
    fds: tuple[int, ...]


class Store:
    """The supervisor's side."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self._closer = Closer()

    def put(self, name: str, value: Any, fds: Sequence[int]) -> None:
        """Keep an entry; the one that it replaces is dropped.

        Not even a directory may be closed here: where it is a probe's, and the worker has none any more, this unmounts
        the probe, which flushes its disk.
        """
        self.drop(name)
        self.entries[name] = Entry(value, tuple(fds))

    def set(self, name: str, value: Any) -> None:
        """Give an entry another value. It keeps its descriptors."""
        self.entries[name] = self.entries[name]._replace(value=value)

    def drop(self, name: str) -> None:
        """Forget an entry, if there is one. Its descriptors are closed on another thread, as it may take for ever."""
        entry = self.entries.pop(name, None)
        for fd in entry.fds if entry else ():
            self._closer.close("/".join(name.split("/")[:3]), fd)

    def inherit(self) -> dict[str, Entry]:
        """In a child that was forked just now: the entries. What was yet to be closed is closed here as well.

        A child has that too, and in no entry: its filesystem would be busy until the child ends.
        """
        left = self._closer.left()
        self._closer = Closer()  # the other's threads, and whoever had its lock, are not here
        for party, fd in left:
            self._closer.close(party, fd)
        return self.entries

    def hear(self, worker: socket.socket) -> bool:
        """Carry out one message of the worker's; False at its end."""
        data, fds, flags, _ = socket.recv_fds(worker, MESSAGE, MOST_FDS)
        if not data:
            return False
        try:
            self._obey(data, fds, flags)
        except Exception:
            for fd in fds:
                self._closer.close("", fd)
            raise
        return True

    def _obey(self, data: bytes, fds: Sequence[int], flags: int) -> None:
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise OSError("a message of the worker's was cut short")
        verb, name, value = json.loads(data)
        if verb == "put":
            self.put(name, value, fds)
        elif verb == "set":
            self.set(name, value)
        else:
            self.drop(name)


class Keeper:
    """The worker's side. Any thread may call it."""

    def __init__(self, supervisor: socket.socket) -> None:
        self._socket = supervisor

    def put(self, name: str, value: Any, fds: Sequence[int] = ()) -> None:
        """Have an entry kept; the descriptors are duplicated."""
        socket.send_fds(self._socket, [json.dumps(["put", name, value]).encode()], list(fds))

    def set(self, name: str, value: Any) -> None:
        """Have an entry's value replaced, and its descriptors kept. It was put before."""
        self._socket.send(json.dumps(["set", name, value]).encode())

    def drop(self, name: str) -> None:
        """Have an entry forgotten."""
        self._socket.send(json.dumps(["drop", name, None]).encode())
