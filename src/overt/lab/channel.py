"""Questions and answers between the user of a disk and the two processes behind it.

A question is one JSON message on a SOCK_SEQPACKET socket, with descriptors beside it where they are needed; so is its
answer, which carries a value or an errno with words. Whoever asks waits for a bounded time, and an answer that comes
after that is recognised by its number and dropped.
"""

import errno
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

LONGEST = 64 << 10
GONE = "the process that kept this disk has ended"


class Question(NamedTuple):
    number: int
    verb: str
    values: dict[str, Any]
    fds: list[int]


def explain(error: OSError) -> str:
    """The error's words without its number, which travels beside them."""
    about = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
    return f"{error.strerror or error}{about}"


class Channel:
    """One end. Asking is for any thread of the process; answering for one."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()
        self._number = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def ask(self, verb: str, *, patience: float = 30.0, fds: Sequence[int] = (), **values: Any) -> Any:
        """Return the answer; raise the OSError that it carries.

        `patience` in seconds, then TimeoutError. ConnectionResetError: nobody is there to answer.
        """
        with self._lock:
            self._number += 1
            deadline = time.monotonic() + patience
            try:
                socket.send_fds(self._socket, [json.dumps([self._number, verb, values]).encode()], fds)
                while True:
                    poller = select.poll()
                    poller.register(self._socket, select.POLLIN)
                    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                        raise TimeoutError(errno.ETIMEDOUT, f"the disk did not answer {verb!r} in {patience:g} s")
                    message = self._socket.recv(LONGEST)
                    if not message:
                        raise ConnectionResetError(errno.ECONNRESET, GONE)
                    number, code, answer = json.loads(message)
                    if number == self._number:
                        break
            except (BrokenPipeError, ConnectionResetError):
                raise ConnectionResetError(errno.ECONNRESET, GONE) from None
        if code:
            raise OSError(code, answer)
        return answer

    def hear(self) -> Question | None:
        """The next question, waited for; None when the asker is gone."""
        try:
            message, fds, _, _ = socket.recv_fds(self._socket, LONGEST, 4, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:  # it went with an answer of ours unread
            return None
        if not message:
            return None
        number, verb, values = json.loads(message)
        return Question(number, verb, values, list(fds))

    def answer(self, question: Question, value: Any = None) -> None:
        self._send([question.number, 0, value])

    def refuse(self, question: Question, error: OSError) -> None:
        self._send([question.number, error.errno or errno.EIO, explain(error)])

    def _send(self, message: list[Any]) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the asker is gone, as the next hear() will say
            self._socket.send(json.dumps(message).encode())

    def serve(self, verbs: Mapping[str, Callable[..., Any]]) -> bool:
        """Answer one question by the function of its name; False when the asker is gone."""
        question = self.hear()
        if question is None:
            return False
        try:
            given = {"fds": question.fds} if question.fds else {}
            self.answer(question, verbs[question.verb](**question.values, **given))
        except OSError as error:
            self.refuse(question, error)
        finally:
            for fd in question.fds:
                os.close(fd)
        return True
