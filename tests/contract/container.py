"""A process apart, in namespaces of its own, that opens files and asks: what a container is to a filesystem."""

import json
import os
import select
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from overt.host import files, mounts, process

SECONDS = 30.0


class Container:
    """A child process; `enter` is called in it first, in mount (and, if wished, pid) namespaces of its own.

    Its descriptors are its own numbers, and go with it.
    """

    def __init__(self, enter: Callable[[], None] = lambda: None, *, pid_namespace: bool = False) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                ours.close()
                _live(theirs, enter, pid_namespace)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        theirs.close()
        ours.settimeout(SECONDS)
        self._socket = ours
        assert self._receive() == "ready"

    def open(self, path: object = ".", flags: int = os.O_RDONLY) -> int:
        """Open a file; the container's descriptor, or minus the errno."""
        return int(self._ask("open", str(path), flags))

    def syncfs(self, fd: int) -> int:
        return int(self._ask("syncfs", fd))

    def syncfs_in_thread(self, fd: int) -> int:
        """The same, from a thread that is not the process's first."""
        return int(self._ask("syncfs_in_thread", fd))

    def syncfs_32(self, fd: int) -> int:
        """The same, by the system call of a 32-bit program."""
        return int(self._ask("syncfs_32", fd))

    def fsync(self, fd: int) -> int:
        return int(self._ask("fsync", fd))

    def write(self, path: object, data: bytes) -> int:
        """Write a file, and close it."""
        return int(self._ask("write", str(path), data.hex()))

    def begin(self, *words: object) -> None:
        """Ask, and do not wait."""
        self._socket.send(json.dumps(words).encode())

    def end(self) -> int:
        """The answer to what was begun."""
        return int(self._receive())

    def waits(self, seconds: float) -> bool:
        """Whether there is no answer within so many seconds to what was begun."""
        return not select.select([self._socket], [], [], seconds)[0]

    def close(self) -> None:
        self._socket.close()
        pidfd = os.pidfd_open(self.pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
        os.waitpid(self.pid, 0)

    def _ask(self, *words: object) -> Any:
        self.begin(*words)
        return self._receive()

    def _receive(self) -> Any:
        answer = self._socket.recv(4096)
        assert answer, "the container ended"
        return json.loads(answer)


def _live(control: socket.socket, enter: Callable[[], None], pid_namespace: bool) -> None:
    process.die_with_parent(signal.SIGKILL)
    process.unshare(process.CLONE_NEWNS | (process.CLONE_NEWPID if pid_namespace else 0))
    mounts.make_private()
    # Inherited descriptors are of the parent's mounts, and are those of the parent's open files.
    keep = 100
    os.dup2(control.fileno(), keep)
    enter()
    os.closerange(3, keep)
    os.closerange(keep + 1, 4096)
    control.detach()
    if pid_namespace:
        pid = os.fork()  # the first process of the new namespace
        if pid:
            os.waitpid(pid, 0)
            return
        process.die_with_parent(signal.SIGKILL)
    _serve(socket.socket(fileno=keep))


def _serve(control: socket.socket) -> None:
    control.send(json.dumps("ready").encode())
    while message := control.recv(1 << 16):
        verb, *words = json.loads(message)
        try:
            answer = _VERBS[verb](*words) or 0
        except OSError as error:
            answer = -error.errno if verb == "open" else error.errno
        control.send(json.dumps(answer).encode())


def _all(fds: list[int]) -> int:
    """syncfs on all of them at once; how many did not return 0."""
    told: list[int] = []

    def call(fd: int) -> None:
        try:
            files.syncfs(fd)
        except OSError as error:
            told.append(error.errno)

    threading.stack_size(1 << 17)
    threads = [threading.Thread(target=call, args=(fd,)) for fd in fds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(told)


def _in_thread(fd: int) -> int:
    result: list[int] = []

    def call() -> None:
        try:
            files.syncfs(fd)
            result.append(0)
        except OSError as error:
            result.append(error.errno)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return result[0]


def _syncfs_32(fd: int) -> int:
    """int 0x80 is the system call of i386, whoever uses it.

    push rbx; mov ebx, edi; mov eax, 344; int 0x80; pop rbx; ret
    """
    import ctypes
    import mmap

    code = bytes.fromhex("53 89fb b858010000 cd80 5b c3")
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return -ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(address)(fd)


_VERBS: dict[str, Callable[..., int | None]] = {
    "open": lambda path, flags: os.open(path, flags | os.O_CLOEXEC),
    "syncfs": files.syncfs,
    "syncfs_in_thread": _in_thread,
    "syncfs_all": _all,
    "syncfs_32": _syncfs_32,
    "fsync": os.fsync,
    "close": os.close,
    "write": lambda path, text: Path(path).write_bytes(bytes.fromhex(text)) and None,
}


def place(fd: int, path: str, *, read_only: bool = False) -> Callable[[], None]:
    """An `enter` that gives a detached mount (`fd`) its place, in the container only."""

    def enter() -> None:
        mounts.attach(fd, path)
        if read_only:
            make_read_only(path)()

    return enter


def make_read_only(path: str) -> Callable[[], None]:
    """An `enter` that makes the mount at `path` read-only, in the container only."""

    def enter() -> None:
        fd = os.open(path, os.O_PATH)
        mounts.set_attributes(fd, add=mounts.MOUNT_ATTR_RDONLY)
        os.close(fd)

    return enter


def chroot(path: str) -> Callable[[], None]:
    """An `enter` that makes `path` the root."""

    def enter() -> None:
        os.chroot(path)
        os.chdir("/")

    return enter


def enter_user_namespace() -> None:
    """An `enter`: a user namespace, and a mount namespace that belongs to it."""
    process.unshare(process.CLONE_NEWUSER | process.CLONE_NEWNS)


def then(*steps: Callable[[], None]) -> Callable[[], None]:
    """One `enter` after the other."""

    def enter() -> None:
        for step in steps:
            step()

    return enter
