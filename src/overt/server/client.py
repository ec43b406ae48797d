"""The other end of the control socket, and a server started for one's own use."""

import errno
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from overt.overlay.options import Options, parse

_CREDENTIALS = struct.Struct("=iII")
_HUNG_UP = "the server hung up: it has ended, or can take no more clients (its log says which)"


class ServerError(Exception):
    """What the server refused; `status` is the exit status for it (1, or 2 for bad usage)."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Client:
    """A conversation with one server."""

    def __init__(self, path: str | Path, patience: float | None = None) -> None:
        """Connect; OSError naming the socket if there is no server.

        `patience`: seconds for the connection and for each answer, which raise TimeoutError then. Mounting and
        unmounting wait for disks, and take as long as these do.
        """
        self._path = os.fspath(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(patience)
        try:
            self._socket.connect(self._path)
        except TimeoutError:
            self._socket.close()
            raise
        except OSError as error:
            self._socket.close()
            # That a path is too long comes without a number.
            why = f"{error.strerror} (is `overt serve` running?)" if error.errno else str(error)
            raise OSError(error.errno or errno.ENAMETOOLONG, why, self._path) from None

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the conversation."""
        self._socket.close()

    @property
    def same_mounts(self) -> bool:
        """Whether the server sees the mounts that we see: a path means the same to it, and its mounts are seen here."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        try:
            theirs = os.stat(f"/proc/{_CREDENTIALS.unpack(credentials)[0]}/ns/mnt")
        except OSError:  # in another pid namespace
            return False
        return os.path.samestat(theirs, os.stat("/proc/self/ns/mnt"))

    def mount(self, target: str, options: str | Options) -> list[str]:
        """Mount at `target`; `options` as for mount -o. Returns what cannot be promised.

        Raises OptionError, or ServerError.
        """
        given = parse(options) if isinstance(options, str) else options
        fields = given.absolute()._asdict()
        return list(self._ask({"do": "mount", "target": os.path.abspath(target), "options": fields}, "notices"))

    def mount_detached(self, options: str, label: str = "detached") -> int:
        """A mount that is not in the tree yet: its descriptor, for move_mount(2). Raises ServerError."""
        fields = parse(options).absolute()._asdict()
        return self._converse({"do": "mount-detached", "target": label, "options": fields})[1]

    def umount(self, target: str) -> dict[str, Any]:
        """Unmount; returns the record of errors. Raises ServerError."""
        return dict(self._ask({"do": "umount", "target": os.path.abspath(target)}, "record"))

    def status(self) -> dict[str, Any]:
        """Mounts, uppers and errors."""
        return dict(self._ask({"do": "status"}, "status"))

    def events(self) -> list[dict[str, Any]]:
        """The latest events."""
        return list(self._ask({"do": "events"}, "events"))

    def stop(self) -> None:
        """Have the server unmount everything and end."""
        self._converse({"do": "stop"})

    def _ask(self, request: dict[str, Any], wanted: str) -> Any:
        answer, _ = self._converse(request)
        if wanted not in answer:
            raise self._no_server()
        return answer[wanted]

    def _converse(self, request: dict[str, Any]) -> tuple[dict[str, Any], int]:
        received, fds = b"", []
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            while not received.endswith(b"\n"):
                data, new, _, _ = socket.recv_fds(self._socket, 1 << 16, 1)
                if not data:
                    raise ServerError(_HUNG_UP, 1)
                received += data
                fds += new
        except (BrokenPipeError, ConnectionResetError):
            raise ServerError(_HUNG_UP, 1) from None
        try:
            answer = json.loads(received)
        except ValueError:
            raise self._no_server() from None
        if not isinstance(answer, dict):
            raise self._no_server()
        if "error" in answer:
            raise ServerError(str(answer["error"]), answer.get("status", 1))
        return answer, fds[0] if fds else -1

    def _no_server(self) -> ServerError:
        return ServerError(f"{self._path}: what listens here is not an overt server", 1)


class Started:
    """A server that `start` made."""

    def __init__(self, process: "subprocess.Popen[bytes]", path: str) -> None:
        self.process = process
        self.path = path

    def pids(self) -> list[int]:
        """All its processes: the server and its watchdog."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [self.process.pid, *map(int, children.read_text().split())]

    def stop(self, patience: float = 30.0) -> int:
        """Have it unmount everything and end; kill it after `patience` seconds. Returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def start(path: str, *, log: str | None = None, patience: float = 20.0) -> Started:
    """Start `overt serve` on socket `path`, ready when this returns; `log`: a file for its events (else discarded).

    Raises OSError if it does not come up within `patience` seconds.
    """
    ready, tell = os.pipe()
    try:
        with open(log or os.devnull, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "overt", "serve", "--foreground", "--socket", path, "--ready-fd", str(tell)],
                pass_fds=[tell], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=output,
            )  # fmt: skip
    finally:
        os.close(tell)
    try:
        if not select.select([ready], [], [], patience)[0] or not os.read(ready, 1):
            process.kill()
            process.wait()
            raise OSError(f"overt serve on {path} did not start{': see ' + log if log else ''}")
    finally:
        os.close(ready)
    return Started(process, path)
