"""A process that ends the connections of a server that has stopped answering.

A stopped FUSE server blocks everybody who touches its mounts, umount(2) and any sync(2) of the machine. The watchdog
asks the engine's loop for a sign of life every few seconds. Without one it looks at what the thread does that led the
loop last: waiting on a disk is no fault of the server's, however long. Stopped, looping, or waiting on a FUSE mount,
which may be its own or a slow layer, it has until the patience is over; then the connections are aborted and it is
killed. Where the loop goes on without a thread that is so kept (server/engine.py), the server aborts by itself the one
connection that keeps it (`is_stuck`, `abort`).

It ends after its server, when the socket between them closes; if somebody kills it, the server starts another
(`Watchdog.renew`).
"""

import contextlib
import os
import select
import signal
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import overt
from overt.events import leave, writer
from overt.host import mounts

_PERIOD = 10.0
"""seconds between two questions"""
PATIENCE = 30.0
"""seconds without an answer"""
_ADD, _DROP, _ASK = b"+", b"-", b"?"
_MESSAGE = struct.Struct("=cQ")
_THEIRS = 3
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); from overt.server import watchdog; watchdog.main(*sys.argv[2:])"
)


def _keep_only(fd: int, *, stderr: bool) -> None:
    """Let go of every other descriptor: whoever waits for the end of our parent's output must not wait for us too.

    And of the directory in which the server was started, whose filesystem somebody may want to unmount.
    """
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1) if stderr else (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(3, fd)
    os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))


class Watchdog:
    """The server's end. `fd` becomes readable when the loop is asked for a sign of life: call `answer`."""

    def __init__(self, *, foreground: bool, period: float = _PERIOD, patience: float = PATIENCE) -> None:
        """Fork the watchdog: before any thread is started. `foreground`: report to standard error, not to syslog(3).

        `period` and `patience` are in seconds.
        """
        self.period = period
        self._patience = patience
        self._foreground = foreground
        # Counted: a new mount can have the number of one that is not reported gone yet.
        self._guarded: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _begin(theirs, server, period, patience, foreground=foreground)
        theirs.close()

    @property
    def fd(self) -> int:
        """The descriptor to be looked at; another one after `renew`."""
        return self._socket.fileno()

    def answer(self, leader: int) -> bool:
        """Give a sign of life of the engine's loop, which thread `leader` leads; False if the watchdog has ended."""
        try:
            if not self._socket.recv(64, socket.MSG_DONTWAIT):
                return False
            self._socket.send(_MESSAGE.pack(_ASK, leader))
        except BlockingIOError:
            pass
        except OSError:  # it ended with something unread
            return False
        return True

    def renew(self) -> None:
        """Start another one for one that has ended; not by the thread that handles requests. OSError if it cannot be.

        A program of its own: there are threads by now, and what locks of theirs guard is not to be used after fork(2).
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            words = [str(Path(overt.__file__).parent.parent), str(os.getpid()), str(self.period), str(self._patience)]
            command = [sys.executable, "-I", "-S", "-c", _PROGRAM, *words, "foreground" if self._foreground else ""]
            try:
                pid = os.posix_spawn(
                    sys.executable, command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), _THEIRS)]
                )
            except OSError:
                ours.close()
                raise
        with self._lock:
            self._socket.close()
            self._reap()
            self._socket, self.pid = ours, pid
            for number in self._guarded.elements():
                ours.send(_MESSAGE.pack(_ADD, number))

    def guard(self, device: int) -> None:
        """Abort the connection of this mount (its st_dev) too, if it comes to that.

        OSError if the watchdog is gone; the next one does it.
        """
        self._send(_ADD, device, 1)

    def release(self, device: int) -> None:
        """The mount is gone."""
        self._send(_DROP, device, -1)

    def _send(self, verb: bytes, device: int, change: int) -> None:
        number = _number(device)
        with self._lock:
            self._guarded[number] += change
            self._socket.send(_MESSAGE.pack(verb, number))

    def close(self) -> None:
        """End the watchdog."""
        with self._lock:
            self._socket.close()
            self._reap()

    def _reap(self) -> None:
        pid, self.pid = self.pid, 0
        if pid:
            with contextlib.suppress(ChildProcessError):  # we were started with SIGCHLD ignored (wait(2), Notes)
                os.waitpid(pid, 0)


def _begin(server: socket.socket, pid: int, period: float, patience: float, *, foreground: bool) -> NoReturn:
    """Be the watchdog of process `pid`, at the other end of `server`."""
    try:
        _keep_only(server.fileno(), stderr=foreground)
        _watch(server, pid, period, patience, writer(foreground=foreground))
    finally:
        leave(0)


def main(pid: str, period: str, patience: str, foreground: str) -> NoReturn:
    """What `Watchdog.renew` starts."""
    _begin(socket.socket(fileno=_THEIRS), int(pid), float(period), float(patience), foreground=bool(foreground))


def _watch(server: socket.socket, pid: int, period: float, patience: float, say: Callable[[str], None]) -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connections = _connections()
    guarded: Counter[int] = Counter()
    leader = pid
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
                guarded[number] += 1
            elif verb == _DROP:
                guarded[number] -= 1
            else:
                asked, silent, leader = False, 0.0, number
        elif not asked:
            server.send(_MESSAGE.pack(_ASK, 0))
            asked = True
        else:
            silent += min(period, 1.0)
            if _on_a_disk(leader, _where(leader)):
                silent = 0.0
            elif silent >= patience:
                _abort(connections, set(+guarded), pid, say)
                return


def _connections() -> str:
    """The directory of FUSE connections; in a user namespace only the one that is mounted already can be used."""
    try:
        return f"/proc/self/fd/{mounts.new_mount('fusectl', [])}"
    except OSError:
        return "/sys/fs/fuse/connections"


def _where(thread: int) -> str:
    try:
        with open(f"/proc/{thread}/wchan") as file:
            return file.read()
    except OSError:
        return ""


def _on_a_disk(thread: int, waits: str) -> bool:
    """Whether a thread waits uninterruptibly for something that is not FUSE."""
    try:
        with open(f"/proc/{thread}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "D" and "fuse" not in waits
    except OSError:
        return False


def is_stuck(thread: int) -> bool:
    """Whether a thread of this process that does not get on is to be given up: it does not wait for a disk."""
    return not _on_a_disk(thread, _where(thread))


def abort(device: int) -> None:
    """End the connection of a FUSE mount (its st_dev): whoever waits for it is answered with ECONNABORTED. OSError."""
    with open(f"{_connections()}/{_number(device)}/abort", "w") as file:
        file.write("1")


def _number(device: int) -> int:
    """/sys/fs/fuse/connections names a connection by the kernel's own form of its device number."""
    return os.major(device) << 20 | os.minor(device) if device else 0


def _abort(connections: str, guarded: set[int], pid: int, say: Callable[[str], None]) -> None:
    say(f"overt: server {pid} has stopped answering: aborting its {len(guarded)} connections")
    for number in guarded:
        try:
            with open(f"{connections}/{number}/abort", "w") as file:
                file.write("1")
        except OSError as error:
            say(f"overt: connection {number}: {error}")
    os.kill(pid, signal.SIGKILL)
