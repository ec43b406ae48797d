"""The control socket: one JSON object a line in, one out. Only the server's own user may connect (mode 0600)."""

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from overt.host import process
from overt.overlay import view
from overt.overlay.options import Options
from overt.server.identity import become_myself
from overt.server.layers import Refusal
from overt.server.registry import answers
from overt.server.service import Service

_LAST_WORDS = 2.0
"""seconds in which a server that ends answers who has asked"""
_PAUSE = 0.01
"""seconds between looks for a descriptor, where there is none"""


class Control:
    """Serves one unix socket; each connection has a thread while it lasts, because a mount takes its time."""

    def __init__(self, service: Service, path: Path, stop: Callable[[], None]) -> None:
        """`stop` ends the server."""
        self._service = service
        self._stop = stop
        self._answering = 0
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._answered = threading.Condition()
        self.path = path
        if (path.is_symlink() or path.exists()) and not path.is_socket():
            raise FileExistsError(errno.EEXIST, "there is a file that is not a socket", os.fspath(path))
        if answers(path):
            raise FileExistsError(errno.EEXIST, "in use: name a socket that no server has", os.fspath(path))
        unready = path.with_name(path.name + ".unready")
        unready.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            self._socket.bind(os.fspath(unready))
            self._socket.listen(16)
        except OSError as error:  # it does not say of what, and of a path that is too long it has no number
            raise OSError(error.errno or errno.ENAMETOOLONG, error.strerror or str(error), os.fspath(path)) from None
        finally:
            os.umask(mask)
        unready.rename(path)  # nobody finds a socket that does not answer yet, and takes it for a dead server's
        service.engine.watch(self._socket.fileno(), self._accept)

    def close(self) -> None:
        """Take the socket away, when who has asked has the answer: to an unmount with which the server ends, say."""
        self._socket.close()
        if self._spare >= 0:
            os.close(self._spare)
        self.path.unlink(missing_ok=True)
        with self._answered:
            self._answered.wait_for(lambda: not self._answering, _LAST_WORDS)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self._turn_away(error.errno)
            return
        try:
            process.start(threading.Thread(target=self._converse, args=(connection,), daemon=True))
        except OSError as error:  # no more threads
            connection.close()
            self._service.events.say("client turned away", why=error.strerror)

    def _turn_away(self, why: int) -> None:
        """There is no descriptor for who calls; left in line he would wake the loop without end."""
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        with contextlib.suppress(OSError):
            self._socket.accept()[0].close()
        try:
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # another thread took it: not so fast, then
            time.sleep(_PAUSE)
        self._service.events.say("client turned away", why=os.strerror(why))

    def _converse(self, connection: socket.socket) -> None:
        become_myself()
        with connection, connection.makefile("rb") as lines:
            for line in lines:
                with self._answered:
                    self._answering += 1
                try:
                    if not self._reply(connection, line):
                        return
                finally:
                    with self._answered:
                        self._answering -= 1
                        self._answered.notify_all()

    def _reply(self, connection: socket.socket, line: bytes) -> bool:
        """Do what a line asks for, and say what came of it; whether the client is still there."""
        fd = -1
        try:
            answer, fd = self._answer(json.loads(line))
        except Refusal as error:
            answer = {"error": str(error), "status": 1}
        except OSError as error:
            answer = {"error": f"{_what(error)}: {error.strerror}", "status": 1, "errno": error.errno}
        except Exception:
            self._service.events.crash("control request")
            answer = {"error": "internal error, see the server's log", "status": 1}
        message = json.dumps(answer).encode() + b"\n"
        try:
            if fd >= 0:
                socket.send_fds(connection, [message], [fd])
            else:
                connection.sendall(message)
            return True
        except OSError as error:  # the client is gone
            self._service.events.say("client gone", why=str(error))
            if "notices" in answer:
                self._take_back(json.loads(line)["target"])
            return False
        finally:
            if fd >= 0:
                os.close(fd)

    def _take_back(self, target: str) -> None:
        """Unmount what somebody asked for who has not heard that he has it."""
        try:
            self._service.umount(target)
        except (OSError, Refusal) as error:
            self._service.events.say("stays mounted", mount=target, why=str(error))

    def _answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], int]:
        verb = request.get("do")
        service = self._service
        if verb == "mount":
            notices = service.mount(_options(request), request["target"])
            return {"notices": notices}, -1
        if verb == "mount-detached":
            fd = service.mount_detached(_options(request), request["target"])
            return {}, fd
        if verb == "umount":
            return {"record": service.umount(request["target"])}, -1
        if verb == "status":
            return {"status": service.status()}, -1
        if verb == "events":
            return {"events": list(service.events.record)}, -1
        if verb == "stop":
            self._stop()
            return {}, -1
        return {"error": f"unknown request {verb!r}", "status": 2}, -1


def _what(error: OSError) -> str:
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "server"


def _options(request: dict[str, Any]) -> Options:
    options = Options(**request["options"])
    return options._replace(lower=tuple(options.lower), data=tuple(options.data), view=view.from_fields(options.view))
