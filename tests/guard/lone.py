"""Processes with a filter of their own on overlays of their own, without a runtime; some keep their listener."""

import ctypes
import json
import os
import random
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from overt.host import files, mounts, process, seccomp
from overt.host.libc import check, libc

from .ground import Ground

Act = Callable[[int], int]


class Lone:
    """A process that is all of a container that matters here: a mount namespace, an overlay, a filter."""

    def __init__(self, ground: Ground, number: int, *, thief: bool = False, act: Act | None = None) -> None:
        """`thief`: a child keeps its listener, and does whatever one can do with it.

        `act`: what it does before it is ready, from a descriptor of its overlay to the one that it calls syncfs(2) on.
        """
        upper, work = (Path(ground.disk.path, f"lone-{kind}-{number}") for kind in ("upper", "work"))
        upper.mkdir()
        work.mkdir()
        options: list[tuple[str, str | int | None]] = [
            ("lowerdir", str(ground.lower)), ("upperdir", str(upper)), ("workdir", str(work)),
        ]  # fmt: skip
        overlay = mounts.new_mount("overlay", options)
        self.go, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._live(ground, number, overlay, inside, thief, act)
            finally:
                os._exit(0)
        inside.close()
        os.close(overlay)

    def _live(
        self, ground: Ground, number: int, overlay: int, inside: socket.socket, thief: bool, act: Act | None
    ) -> None:
        process.die_with_parent(signal.SIGKILL)
        for fd in range(3, inside.fileno() + 1):
            if fd not in (overlay, inside.fileno()):
                os.closerange(fd, fd + 1)  # the other containers' above all
        process.unshare(process.CLONE_NEWNS)
        mounts.make_private()
        mounts.attach(overlay, "/mnt")
        os.close(overlay)
        fd = os.open("/mnt", os.O_RDONLY)
        listener = seccomp.notify("syncfs")
        state = {"fds": ["seccompFd"], "pid": os.getpid(), "state": {"id": f"lone-{number}", "bundle": "/"}}
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as runtime:
            runtime.connect(str(ground.base / "guard"))
            socket.send_fds(runtime, [json.dumps(state).encode()], [listener])
        if thief and os.fork() == 0:
            process.die_with_parent(signal.SIGKILL)
            steal(listener)
        os.close(listener)
        if act is not None:
            fd = act(fd)
        inside.send(b"ready")
        while inside.recv(1):
            try:
                files.syncfs(fd)
                code = 0
            except OSError as error:
                code = error.errno or -1
            inside.send(struct.pack("=id", code, time.monotonic()))

    def answer(self) -> tuple[int, float]:
        """The errno of its call, and when it had it."""
        code, when = struct.unpack("=id", self.go.recv(64))
        return code, when

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.go.close()


@contextmanager
def several(ground: Ground, count: int, *, thief: bool = False, act: Act | None = None) -> Iterator[list[Lone]]:
    """So many, ready to call."""
    made: list[Lone] = []
    try:
        for number in range(count):
            made.append(Lone(ground, number, thief=thief, act=act))
        for each in made:
            assert each.go.recv(16) == b"ready"
        yield made
    finally:
        for each in made:
            each.end()


def steal(listener: int) -> None:
    """Random ioctls: take notifications, answer some of them, with anything, or somebody else's; change flags."""
    dice = random.Random(1)
    number = 0
    while True:
        request = dice.choice((0xC0502100, 0xC0182101, 0x40082102, 0x40082104, 0x40182103, dice.getrandbits(32)))
        room = ctypes.create_string_buffer(80)
        if request != 0xC0502100:
            struct.pack_into("=QqiI", room, 0, number + dice.choice((0, 0, 1)), 0, -dice.choice((0, 11)), 0)
        signal.setitimer(signal.ITIMER_REAL, 0.002)
        signal.signal(signal.SIGALRM, lambda *_: None)
        with suppress(OSError):
            check(libc.ioctl(listener, ctypes.c_ulong(request), room))
            if request == 0xC0502100:
                number = struct.unpack_from("=Q", room)[0]
