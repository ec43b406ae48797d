"""A process that is all of a container that matters here, and carries out functions of the test's."""

import errno
import json
import os
import pickle
import select
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from overt.host import files, mounts, process, seccomp

from .ground import Ground

SECONDS = 30.0


class Member:
    """See above: it has a mount namespace and a filter of its own, and no overlay until it mounts one."""

    def __init__(self, ground: Ground, name: str, **said: Any) -> None:
        """`said`: more of the container process state."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pair = here
        self.pid = os.fork()
        if self.pid == 0:
            try:
                here.close()
                self._live(ground, name, there, said)
            except BaseException:
                there.send(pickle.dumps(traceback.format_exc()))
            finally:
                os._exit(0)
        there.close()
        try:
            said_first = self._hear(SECONDS)
            assert said_first == "ready", said_first
        except BaseException:
            self.end()
            raise

    def _live(self, ground: Ground, name: str, pair: socket.socket, said: dict[str, Any]) -> None:
        process.die_with_parent(signal.SIGKILL)
        for fd in range(3, 256):
            if fd != pair.fileno():
                os.closerange(fd, fd + 1)
        process.unshare(process.CLONE_NEWNS)
        mounts.make_private()
        listener = seccomp.notify("syncfs")
        state = {"fds": ["seccompFd"], "pid": os.getpid(), "state": {"id": name, "bundle": "/nonexistent"}, **said}
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as runtime:
            runtime.connect(str(ground.base / "guard"))
            data = json.dumps(state).encode()
            sent = socket.send_fds(runtime, [data], [listener])
            if sent < len(data):
                runtime.sendall(data[sent:])
        os.close(listener)
        pair.send(pickle.dumps("ready"))
        while data := pair.recv(1 << 16):
            act, args = pickle.loads(data)
            try:
                answer = act(*args)
            except BaseException as error:
                answer = error
            pair.send(pickle.dumps(answer))

    def do(self, act: Callable[..., Any], *args: object, seconds: float = SECONDS) -> Any:
        """What `act`, a module's function, returns there; an exception is raised here."""
        self._pair.send(pickle.dumps((act, args)))
        answer = self._hear(seconds)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _hear(self, seconds: float) -> Any:
        assert select.select([self._pair], [], [], seconds)[0], f"no answer in {seconds:g} s"
        return pickle.loads(self._pair.recv(1 << 16))

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._pair.close()


@contextmanager
def member(ground: Ground, name: str = "member", **said: Any) -> Iterator[Member]:
    made = Member(ground, name, **said)
    try:
        yield made
    finally:
        made.end()


def overlay(below: Path) -> int:
    """Mount an overlay on BELOW/merged, with its directories there, which may exist; its device number."""
    for part in ("lower", "upper", "work", "merged"):
        (below / part).mkdir(parents=True, exist_ok=True)
    options: list[tuple[str, str | int | None]] = [
        ("lowerdir", str(below / "lower")), ("upperdir", str(below / "upper")), ("workdir", str(below / "work")),
    ]  # fmt: skip
    fd = mounts.new_mount("overlay", options)
    try:
        mounts.attach(fd, str(below / "merged"))
    finally:
        os.close(fd)
    return os.stat(below / "merged").st_dev


def tmpfs(at: Path) -> None:
    """Mount one."""
    fd = mounts.new_mount("tmpfs", [])
    try:
        mounts.attach(fd, str(at))
    finally:
        os.close(fd)


def syncfs(fd: int) -> int:
    """The errno that syncfs(2) returns, or 0."""
    try:
        files.syncfs(fd)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def new_syncfs(path: Path) -> int:
    """The same, on a descriptor opened just now."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return syncfs(fd)
    finally:
        os.close(fd)


def write(path: Path, data: bytes) -> None:
    """Write a page, and close."""
    path.write_bytes((data * 4096)[:4096])
