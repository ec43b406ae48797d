"""Containers for the demo: processes that have an overlay as their root, and answer questions about it.

What makes a container here is its own mount namespace and pivot_root(2), as in any container runtime. It runs no
program: it is a fork, so that a thousand of them cost little. Two things keep it cheap:

The overlay arrives as a detached mount, by its descriptor, and is attached after the unshare. Were it attached first,
each namespace would begin as a copy with everybody's overlays in it: a million mounts for a thousand containers.

The old root is let go, so that a namespace ends up with one mount. It ends with its process, and the kernel takes the
overlay down before the process is reported dead: to reap a container is to unmount its overlay.
"""

import errno
import json
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from overt.host import files, process, seccomp
from overt.lab import bounded
from overt.lab.container import close_all_but, enter

PATIENCE = 60.0  # seconds: a flush may take a while, but not that long
BLOCK = 4096


class Life:
    """What a container does. Its methods are what it can be asked; an answer is a list of errno numbers."""

    def __init__(self, unlucky: bytes) -> None:
        self._unlucky = unlucky
        self._before = _open_root()
        self._own = _create("/own", bytes(BLOCK))
        self._lost = -1

    def lose(self) -> list[int]:
        """Write what the disk will refuse. Nothing is known of that yet."""
        self._lost = _create("/lost", self._unlucky)
        return [0]

    def new_fd(self) -> list[int]:
        fd = _open_root()
        try:
            return _twice(files.syncfs, fd)
        finally:
            os.close(fd)

    def old_fd(self) -> list[int]:
        return _twice(files.syncfs, self._before)

    def fsync(self) -> list[int]:
        return _twice(os.fsync, self._own)

    def victim_fsync(self) -> list[int]:
        return _twice(os.fsync, self._lost)


class Container:
    """A container as its maker sees it, which has to be a process with one thread.

    `overlay` is a detached mount's descriptor, `place` a directory where it is attached before it becomes the root;
    `unlucky` are the bytes that the container writes when asked to lose(); `guard` is the socket of an `overt guard` to
    which it hands its syncfs(2) over, or None.
    """

    def __init__(self, name: str, overlay: int, place: str, unlucky: bytes, guard: str | None) -> None:
        self.name = name
        self._socket, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with inside:
            self.pid = os.fork()
            if self.pid == 0:
                _live(name, overlay, inside.fileno(), place, unlucky, guard)
        self._socket.settimeout(PATIENCE)

    def ask(self, question: Callable[[Life], list[int]]) -> list[int]:
        """The answer to a method of Life; OSError if the container has failed, died, or says nothing."""
        try:
            self._socket.send(question.__name__.encode())
        except BrokenPipeError:
            raise OSError(errno.ECHILD, f"{self.name} is dead") from None
        return self.hear(question.__name__)

    def hear(self, about: str) -> list[int]:
        try:
            message = self._socket.recv(4096)
        except TimeoutError:
            raise TimeoutError(errno.ETIMEDOUT, f"{self.name}: no answer to {about} in {PATIENCE:g} s") from None
        if not message:
            raise OSError(errno.ECHILD, f"{self.name} died at {about}")
        answer = json.loads(message)
        if isinstance(answer, str):
            raise OSError(errno.EIO, f"{self.name}: {about}: {answer}")
        return list(answer)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._socket.close()


@contextmanager
def contain(
    overlays: list[int], place: str, unlucky: bytes, step: Callable[[], None], guard: str | None = None
) -> Iterator[list[Container]]:
    """A container for each of `overlays`, whose descriptors are taken from the list and closed; all gone at the end.

    `step` is called when one is ready. See Container for the rest.
    """
    containers: list[Container] = []
    try:
        while overlays:
            containers.append(Container(f"container {len(containers) + 1}", overlays[-1], place, unlucky, guard))
            os.close(overlays.pop())
        for container in containers:
            container.hear("its start")
            step()
        yield containers
    finally:
        for container in containers:
            container.kill()
        stuck = [container.name for container in containers if bounded.wait(container.pid, PATIENCE) is None]
        if stuck:
            raise TimeoutError(errno.ETIMEDOUT, f"killed, but not dead in {PATIENCE:g} s: {', '.join(stuck)}")


def _live(name: str, overlay: int, control: int, place: str, unlucky: bytes, guard: str | None) -> NoReturn:
    try:
        process.die_with_parent(signal.SIGKILL)
        close_all_but(overlay, control)
        with socket.socket(fileno=control) as conversation:
            try:
                with _connected(guard) as runtime:
                    enter(overlay, place)
                    if runtime is not None:
                        _hand_over_syncfs(runtime, name)
                life = Life(unlucky)
                conversation.send(json.dumps([0]).encode())
                while question := conversation.recv(64):
                    conversation.send(json.dumps(getattr(life, question.decode())()).encode())
            except ConnectionError:
                raise
            except OSError as error:
                conversation.send(json.dumps(str(error)).encode())
    except ConnectionError:
        pass  # whoever asked has gone
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


@contextmanager
def _connected(guard: str | None) -> Iterator[socket.socket | None]:
    """A connection to the guard, made while its path still means something."""
    if guard is None:
        yield None
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as runtime:
        runtime.connect(guard)
        yield runtime


def _hand_over_syncfs(runtime: socket.socket, name: str) -> None:
    """What a runtime does that is told a listenerPath (OCI runtime specification, config-linux.md, seccomp)."""
    listener = seccomp.notify("syncfs")
    try:
        state = {"fds": ["seccompFd"], "pid": os.getpid(), "state": {"id": name, "pid": os.getpid(), "bundle": ""}}
        socket.send_fds(runtime, [json.dumps(state).encode()], [listener])
    finally:
        os.close(listener)


def _open_root() -> int:
    return os.open("/", os.O_RDONLY | os.O_DIRECTORY)


def _create(path: str, data: bytes) -> int:
    """A new file, and its descriptor. What is written has left for the upper when this returns.

    It would on kernel overlayfs, which has no pages of its own. A FUSE filesystem that caches writes hands them over
    when a descriptor is closed, and a duplicate will do.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, data)
    os.close(os.dup(fd))
    return fd


def _twice(call: Callable[[int], None], fd: int) -> list[int]:
    return [_errno(call, fd), _errno(call, fd)]


def _errno(call: Callable[[int], None], fd: int) -> int:
    try:
        call(fd)
    except OSError as error:
        return error.errno or errno.EIO
    return 0
