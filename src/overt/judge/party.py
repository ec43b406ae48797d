"""A party: a process that has something as its root, and makes system calls when it is told to.

A container's root is a system's mount; the host's is the plain filesystem. Both make the same calls. Each method of
`Calls` that has no underscore is a verb of scenarios; it returns the one word of its answer, and OSError is one too.

The mount arrives as a detached clone and is attached in a namespace that has nothing else of ours in it: were the
namespace a copy of the one where all overlays are mounted, a thousand containers would have a million mounts.
"""

import ctypes
import errno
import json
import mmap
import os
import signal
import socket
import traceback
from collections.abc import Sequence
from typing import NoReturn

from overt.host import files, process
from overt.host.libc import check, libc
from overt.judge.guarded import bring_in
from overt.judge.scenario import Nonsense
from overt.lab import bounded
from overt.lab.container import close_all_but, enter

PATIENCE = 45.0  # seconds that a call may take
BLOCK = 4096

_SYNC_FILE_RANGE_ALL = 7  # wait before, write, wait after
_MS_REMOUNT, _MS_BIND, _MS_RDONLY = 32, 4096, 1
FLAGS = {
    "r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR, "create": os.O_CREAT, "excl": os.O_EXCL, "trunc": os.O_TRUNC,
    "append": os.O_APPEND, "sync": os.O_SYNC, "dsync": os.O_DSYNC, "direct": os.O_DIRECT, "dir": os.O_DIRECTORY,
    "path": os.O_PATH, "nofollow": os.O_NOFOLLOW, "nonblock": os.O_NONBLOCK, "tmp": os.O_TMPFILE,
}  # fmt: skip
"""how `open` opens"""
READ_ONLY = {"place": _MS_REMOUNT | _MS_BIND | _MS_RDONLY, "superblock": _MS_REMOUNT | _MS_RDONLY}
"""what `read_only` makes so"""


def contents(marker: bytes) -> dict[str, bytes]:
    """A block of each kind of content. `doomed` is what a disk that fails data refuses."""
    return {
        "doomed": marker * (BLOCK // len(marker)),
        "safe": b"safe" * (BLOCK // 4),
        "lower": b"low " * (BLOCK // 4),
        "zeros": bytes(BLOCK),
    }


def filled(text: str) -> bytes:
    """A block of a text's repetitions."""
    return (text.encode() * BLOCK)[:BLOCK]


class Calls:
    """What a party can be told to do, relative to its root."""

    def __init__(self, marker: bytes) -> None:
        self._contents = contents(marker)
        self._fds: dict[str, int] = {}
        self._maps: list[mmap.mmap] = []

    def open(self, name: str, path: str, *flags: str) -> str:
        """open PATH [r|w|rw] [create] [trunc] [sync] ...: without any, for reading."""
        bits = 0
        for flag in flags:
            bits |= FLAGS[flag]
        self._fds[name] = os.open(path, bits | os.O_CLOEXEC, 0o644)
        return "0"

    def close(self, name: str, fd: str) -> str:
        os.close(self._fds.pop(fd))
        return "0"

    def dup(self, name: str, fd: str) -> str:
        self._fds[name] = os.dup(self._fds[fd])
        return "0"

    def write(self, name: str, fd: str, what: str, blocks: str = "1", at: str = "0") -> str:
        """write FD CONTENT [BLOCKS [AT]]: what is written has left for the upper when this returns.

        It has on kernel overlayfs, which has no pages of its own. A FUSE filesystem that caches writes hands them over
        when a descriptor is closed, and a duplicate will do.
        """
        number = self._fds[fd]
        os.pwrite(number, self._contents[what] * int(blocks), int(at) * BLOCK)
        os.close(os.dup(number))
        return "0"

    def map(self, name: str, fd: str, what: str) -> str:
        """map FD CONTENT: the same through a shared mapping of the first block."""
        number = self._fds[fd]
        if os.fstat(number).st_size < BLOCK:
            os.ftruncate(number, BLOCK)
        mapping = mmap.mmap(number, BLOCK)
        mapping[:] = self._contents[what]
        self._maps.append(mapping)
        return "0"

    def msync(self, name: str) -> str:
        """msync: of the latest mapping."""
        self._maps[-1].flush()
        return "0"

    def read(self, name: str, fd: str) -> str:
        """read FD: what the first block holds: doomed, safe, lower, zeros, empty, or other."""
        found = os.pread(self._fds[fd], BLOCK, 0)
        if not found:
            return "empty"
        return next((word for word, content in self._contents.items() if found == content), "other")

    def look(self, name: str, path: str) -> str:
        """look PATH: the same by a new descriptor; absent if there is no such file."""
        try:
            self._fds["_"] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return "absent"
        try:
            return self.read("", "_")
        finally:
            os.close(self._fds.pop("_"))

    def fsync(self, name: str, fd: str) -> str:
        os.fsync(self._fds[fd])
        return "0"

    def fdatasync(self, name: str, fd: str) -> str:
        os.fdatasync(self._fds[fd])
        return "0"

    def syncfs(self, name: str, fd: str) -> str:
        files.syncfs(self._fds[fd])
        return "0"

    def newly(self, name: str, call: str, path: str) -> str:
        """newly syncfs|fsync PATH: on a descriptor opened for that and closed again."""
        self._fds["_"] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return str(getattr(self, call)("", "_"))
        finally:
            os.close(self._fds.pop("_"))

    def sync_file_range(self, name: str, fd: str) -> str:
        check(libc.sync_file_range(self._fds[fd], ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_ALL))
        return "0"

    def forget(self, name: str, fd: str) -> str:
        """forget FD: its clean pages leave the cache (posix_fadvise)."""
        os.posix_fadvise(self._fds[fd], 0, 0, os.POSIX_FADV_DONTNEED)
        return "0"

    def drop(self, name: str, path: str) -> str:
        """drop PATH: the same, if there is such a file."""
        try:
            self.open("_", path)
        except FileNotFoundError:
            return "0"
        self.forget("", "_")
        return self.close("", "_")

    def put(self, name: str, path: str, text: str) -> str:
        """put PATH TEXT: a file whose block is filled with TEXT; it keeps what it has after that."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(fd, filled(text), 0)
        finally:
            os.close(fd)
        return "0"

    def mkdir(self, name: str, path: str) -> str:
        os.mkdir(path)
        return "0"

    def mkfifo(self, name: str, path: str) -> str:
        os.mkfifo(path)
        return "0"

    def symlink(self, name: str, target: str, path: str) -> str:
        os.symlink(target, path)
        return "0"

    def unlink(self, name: str, path: str) -> str:
        os.unlink(path)
        return "0"

    def rename(self, name: str, old: str, new: str) -> str:
        os.rename(old, new)
        return "0"

    def link(self, name: str, old: str, new: str) -> str:
        os.link(old, new)
        return "0"

    def chmod(self, name: str, path: str, mode: str) -> str:
        os.chmod(path, int(mode, 8))
        return "0"

    def truncate(self, name: str, path: str, size: str) -> str:
        os.truncate(path, int(size))
        return "0"

    def fill(self, name: str, path: str) -> str:
        """fill PATH: a file that takes all space there is."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        size = 1 << 20
        try:
            while size >= BLOCK:
                try:
                    os.write(fd, bytes(size))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    size //= 2
            os.fsync(fd)
        finally:
            os.close(fd)
        return "0"

    def read_only(self, name: str, what: str) -> str:
        """read_only place|superblock: remounted so, as container runtimes do, or as mount -o remount,ro does."""
        check(libc.mount(None, b"/", None, READ_ONLY[what], None))
        return "0"


class Party:
    """A party as the one sees it who tells it what to do (a process with one thread)."""

    def __init__(self, name: str, root: int, place: str, clean: int, marker: bytes, door: int = -1) -> None:
        """`root`: a detached mount's descriptor; `place`: where it is attached in the namespace `clean`; `door`: see
        System.door.

        OSError if it cannot start.
        """
        self.name = name
        self._socket, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with inside:
            self.pid = os.fork()
            if self.pid == 0:
                _live(root, inside.fileno(), place, clean, marker, door)
        self._socket.settimeout(PATIENCE)
        self._ended = False

    def ready(self) -> None:
        """Return when it has started. OSError if it could not."""
        answer, words = self._hear("its start")
        if answer != "0":
            raise OSError(errno.EIO, f"{self.name} did not start: {words}")

    def do(self, verb: str, name: str, words: Sequence[str]) -> str:
        """The answer of a verb. OSError if there is none; Nonsense if the scenario makes no sense."""
        try:
            self._socket.send(json.dumps([verb, name, list(words)]).encode())
        except BrokenPipeError:
            raise OSError(errno.ECHILD, f"{self.name} is dead") from None
        answer, why = self._hear(verb)
        if not answer:
            raise Nonsense(why)
        return answer

    def _hear(self, about: str) -> tuple[str, str]:
        try:
            message = self._socket.recv(4096)
        except TimeoutError:
            raise TimeoutError(errno.ETIMEDOUT, f"{self.name}: no answer to {about} in {PATIENCE:g} s") from None
        if not message:
            raise OSError(errno.ECHILD, f"{self.name} died at {about}")
        answer, words = json.loads(message)
        return str(answer), str(words)

    def end(self) -> None:
        """Kill and reap it, once; its mount goes with it. TimeoutError if it does not die."""
        if self._ended:
            return
        self._ended = True
        os.kill(self.pid, signal.SIGKILL)
        self._socket.close()
        if bounded.wait(self.pid, PATIENCE) is None:
            raise TimeoutError(errno.ETIMEDOUT, f"{self.name} was killed, but is not dead in {PATIENCE:g} s")


def _live(root: int, control: int, place: str, clean: int, marker: bytes, door: int) -> NoReturn:
    try:
        process.die_with_parent(signal.SIGKILL)
        close_all_but(root, control, clean, *([door] if door >= 0 else []))
        with socket.socket(fileno=control) as conversation:
            try:
                process.setns(clean, process.CLONE_NEWNS)
                os.close(clean)
                enter(root, place)
                if door >= 0:
                    bring_in(door)
            except OSError as error:
                conversation.send(json.dumps(["EIO", str(error)]).encode())
                raise
            calls = Calls(marker)
            conversation.send(b'["0", ""]')
            while question := conversation.recv(4096):
                conversation.send(json.dumps(_answer(calls, *json.loads(question))).encode())
    except ConnectionError:
        pass  # whoever asked has gone
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _answer(calls: Calls, verb: str, name: str, words: list[str]) -> tuple[str, str]:
    """The word, or an empty one and what makes no sense about the question."""
    method = None if verb.startswith("_") else getattr(calls, verb, None)
    if method is None:
        return "", f"there is no verb {verb!r}"
    try:
        return method(name, *words), ""
    except OSError as error:
        return errno.errorcode.get(error.errno or errno.EIO, "EIO"), ""
    except (KeyError, TypeError, IndexError, ValueError) as error:
        return "", f"{verb} {' '.join(words)}: {type(error).__name__}: {error}"
