"""Nothing hangs: a process beside the session that ends the servers of a test which takes too long.

A program that waits for a FUSE server in a system call cannot be interrupted, not by pytest's timeout either. So
somebody else has to end the wait: the servers are killed, and, as a thread of theirs may wait too, their connections
aborted.
"""

import json
import os
import select
import signal
import socket
from pathlib import Path

from overt.host import mounts


def _connections() -> set[int]:
    """Overt's mounts in this namespace, as /sys/fs/fuse/connections names them."""
    found = set()
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        if ".overt " in line:
            major, _, minor = line.split()[2].partition(":")
            found.add(int(major) << 20 | int(minor))
    return found


class Guard:
    """Armed with the servers and the seconds that they have; any number of times."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                ours.close()
                _guard(theirs, _connections())
            finally:
                os._exit(0)
        theirs.close()
        self._socket = ours

    def arm(self, servers: list[int], seconds: float) -> None:
        """Kill the processes `servers` after `seconds`, unless armed anew or disarmed before."""
        self._socket.send(json.dumps([seconds, servers]).encode())

    def disarm(self) -> None:
        self._socket.send(b"null")

    def close(self) -> None:
        self._socket.close()
        os.waitpid(self._pid, 0)


def _guard(control: socket.socket, before: set[int]) -> None:
    fusectl = mounts.new_mount("fusectl", [])
    armed = None
    while True:
        if select.select([control], [], [], armed[0] if armed else None)[0]:
            message = control.recv(1 << 16)
            if not message:
                return
            armed = json.loads(message)
            continue
        assert armed
        for pid in armed[1]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for number in _connections() - before:
            try:
                Path(f"/proc/self/fd/{fusectl}/{number}/abort").write_text("1")
            except OSError as error:
                print(f"guard: connection {number}: {error}")
        armed = None
