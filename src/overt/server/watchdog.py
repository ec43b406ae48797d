"""A process that ends the connections of a server that has stopped answering.

A stopped FUSE server blocks everybody who touches its mounts, umount(2) and any sync(2) of the machine. The watchdog
asks the engine's loop for a sign of life every few seconds. Without one it looks at what that thread does: waiting on
a FUSE mount means that it waits for itself, and the connections are aborted at once; waiting on a disk is no fault of
the server's and is reported; otherwise (stopped, or looping) they are aborted when the patience is over.
"""

import os
import select
import signal
import socket
import struct
import sys

from overt.host import mounts, process

_PERIOD = 10.0
"""seconds between two questions"""
_PATIENCE = 30.0
"""seconds without an answer"""
_ADD, _DROP, _ASK = b"+", b"-", b"?"
_MESSAGE = struct.Struct("=cQ")


class Watchdog:
    """The server's end. `fd` becomes readable when the loop is asked for a sign of life: call `answer`."""

    def __init__(self, *, period: float = _PERIOD, patience: float = _PATIENCE) -> None:
        """Fork the watchdog: before any thread is started. `period` and `patience` in seconds."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            try:
                _watch(theirs, server, period, patience)
            finally:
                os._exit(0)
        theirs.close()
        ours.setblocking(False)
        self._socket = ours
        self.fd = ours.fileno()

    def answer(self) -> None:
        """Give a sign of life; from the engine's thread."""
        try:
            if self._socket.recv(64):
                self._socket.send(_MESSAGE.pack(_ASK, 0))
        except BlockingIOError:
            return

    def guard(self, device: int) -> None:
        """Abort the connection of this mount (its st_dev) too, if it comes to that. OSError if the watchdog is gone."""
        self._send(_ADD, device)

    def release(self, device: int) -> None:
        """The mount is gone."""
        self._send(_DROP, device)

    def _send(self, verb: bytes, device: int) -> None:
        # /sys/fs/fuse/connections names a connection by the kernel's own form of its device number.
        number = os.major(device) << 20 | os.minor(device) if device else 0
        self._socket.setblocking(True)
        self._socket.send(_MESSAGE.pack(verb, number))
        self._socket.setblocking(False)

    def close(self) -> None:
        """End the watchdog."""
        self._socket.close()
        os.waitpid(self.pid, 0)


def _watch(server: socket.socket, pid: int, period: float, patience: float) -> None:
    process.die_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connections = _connections()
    guarded: set[int] = set()
    silent = 0.0
    asked = False
    while True:
        ready, _, _ = select.select([server], [], [], period if not asked else min(period, 1.0))
        if ready:
            message = server.recv(64)
            if not message:
                return
            verb, number = _MESSAGE.unpack(message)
            if verb == _ADD:
                guarded.add(number)
            elif verb == _DROP:
                guarded.discard(number)
            else:
                asked, silent = False, 0.0
        elif not asked:
            server.send(_MESSAGE.pack(_ASK, 0))
            asked = True
        else:
            silent += min(period, 1.0)
            waits = _where(pid)
            if "fuse" in waits or "request_wait" in waits:
                silent = patience
            if silent >= patience and not _on_a_disk(pid, waits):
                _abort(connections, guarded, pid)
                return


def _connections() -> str:
    """The directory of FUSE connections; in a user namespace only the one that is mounted already can be used."""
    try:
        return f"/proc/self/fd/{mounts.new_mount('fusectl', [])}"
    except OSError:
        return "/sys/fs/fuse/connections"


def _where(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/wchan") as file:
            return file.read()
    except OSError:
        return ""


def _on_a_disk(pid: int, waits: str) -> bool:
    """Whether the server's main thread waits uninterruptibly for something that is not FUSE."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "D" and "fuse" not in waits
    except OSError:
        return False


def _abort(connections: str, guarded: set[int], pid: int) -> None:
    print(
        f"overt: server {pid} has stopped answering: aborting its {len(guarded)} connections",
        file=sys.stderr,
        flush=True,
    )
    for number in guarded:
        try:
            with open(f"{connections}/{number}/abort", "w") as file:
                file.write("1")
        except OSError as error:
            print(f"overt: connection {number}: {error}", file=sys.stderr, flush=True)
    os.kill(pid, signal.SIGKILL)
