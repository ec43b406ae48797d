"""A disk that stays: `overt lab up`. A process of its own keeps it, and takes orders on a socket until `down`.

The process is found by the directory: its socket, in /run/overt/lab, is named after the path. If it is killed, its
disk goes with it (overt.lab.keeper), and the socket answers nobody.
"""

import errno
import hashlib
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from overt.lab.channel import Channel, Question
from overt.lab.disk import Disk
from overt.lab.worker import Stopped, stop_on_sigterm

RUN = Path("/run/overt/lab")
_PATIENCE = 120.0  # seconds
_NEEDED = ("/dev", "/proc", "/run", "/sys")


def socket_of(directory: str | os.PathLike[str]) -> Path:
    """Where the process listens that keeps the disk at a directory."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:16]
    return RUN / name


def ask(directory: str | os.PathLike[str], verb: str, **values: Any) -> Any:
    """Give an order; the answer. FileNotFoundError if no disk of ours is there; the OSError that the order met."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        try:
            sock.connect(os.fspath(socket_of(directory)))
        except ConnectionRefusedError:  # it was killed
            socket_of(directory).unlink(missing_ok=True)
            raise _none(directory) from None
        except FileNotFoundError:
            raise _none(directory) from None
        return Channel(sock).ask(verb, patience=_PATIENCE, **values)


def _none(directory: str | os.PathLike[str]) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "no disk of the lab is here", os.fspath(directory))


def up(directory: str, filesystem: str, size: int, mount_options: str) -> None:
    """Have a new process keep a disk at `directory`; return when it is mounted. OSError, and nothing is left.

    Not over what it needs itself: it would find neither its device nor, afterwards, itself.

    FileExistsError if there is one already.
    """
    with suppress(FileNotFoundError):
        ask(directory, "status")
        raise FileExistsError(errno.EEXIST, "a disk of the lab is here already", directory)
    directory = os.path.realpath(directory)  # the process has another working directory
    if not os.path.isdir(directory):
        raise NotADirectoryError(errno.ENOTDIR, "not a directory", directory)
    if any(os.path.commonpath([directory, needed]) == directory for needed in _NEEDED):
        raise OSError(errno.EBUSY, "the lab itself needs what is there: name another directory", directory)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        pid = os.fork()
        if pid == 0:
            ours.close()
            if os.fork() == 0:
                _keep(directory, filesystem, size, mount_options, theirs)
            os._exit(0)
        theirs.close()
        os.waitpid(pid, 0)
        channel = Channel(ours)
        channel.ask("start", patience=_PATIENCE)
        channel.ask("stay")


def _keep(directory: str, filesystem: str, size: int, mount_options: str, asker: socket.socket) -> NoReturn:
    """The process. It answers the one who started it, and lets go of his terminal.

    The disk stays if he asks for that when he has heard that it is there: else he was interrupted, and nobody knows it.
    """
    try:
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):  # what goes wrong is said on the channel; the disk's own processes inherit these
            os.dup2(null, fd)
        channel = Channel(asker)
        question = channel.hear()
        if question:
            path = socket_of(directory)
            try:
                stop_on_sigterm()
                with (
                    Disk(filesystem, size, directory, mount_options=mount_options) as disk,
                    _listener(path) as listener,
                ):
                    try:
                        channel.answer(question)
                        question = channel.hear()
                        if question:
                            channel.answer(question)
                            channel.close()
                            _serve(listener, disk, directory)
                    finally:
                        path.unlink(missing_ok=True)
            except OSError as error:
                if question:
                    channel.refuse(question, error)
    except Stopped:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _listener(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # of one that was killed
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(os.fspath(path))
    listener.listen()
    return listener


def _serve(listener: socket.socket, disk: Disk, directory: str) -> None:
    """Take orders, one asker after the other, until one is `down`. Whoever pushes keeps nobody waiting."""
    failing: list[str] = []
    hanging_until = 0.0

    def fail(what: str, code: int, marker: str | None, skip: int) -> None:
        disk.fail(what, errno=code, marker=os.fsencode(marker) if marker else None, skip=skip)
        failing.append(f"{what} {errno.errorcode.get(code, code)}")

    def heal() -> None:
        disk.heal()
        failing.clear()

    def hang(seconds: float) -> None:
        nonlocal hanging_until
        disk.hang(seconds)
        hanging_until = time.monotonic() + seconds

    def resume() -> None:
        nonlocal hanging_until
        disk.resume()
        hanging_until = 0.0

    def status() -> dict[str, Any]:
        state = "hanging" if time.monotonic() < hanging_until else "failing" if failing else "well"
        state = state if disk.is_mounted else "unmounted"
        about = {"directory": directory, "filesystem": disk.filesystem, "size": disk.size, "device": disk.device}
        return {**about, "pid": os.getpid(), "state": state, "failing": failing, **disk.counters()._asdict()}

    def snapshot(path: str, durable: bool) -> None:
        disk.snapshot(path, durable=durable).close()

    verbs: dict[str, Callable[..., Any]] = {
        "fail": fail, "heal": heal, "hang": hang, "resume": resume, "push": disk.push, "status": status,
        "snapshot": snapshot,
    }  # fmt: skip

    def answer(sock: socket.socket, channel: Channel, question: Question) -> None:
        with sock:
            try:
                channel.answer(question, verbs[question.verb](**question.values))
            except OSError as error:
                channel.refuse(question, error)
            except (KeyError, TypeError, ValueError) as error:
                channel.refuse(question, OSError(errno.EINVAL, str(error)))

    while True:
        sock, _ = listener.accept()
        channel = Channel(sock)
        question = channel.hear()
        if question is None:
            sock.close()
        elif question.verb == "push":
            threading.Thread(target=answer, args=(sock, channel, question), daemon=True).start()
        elif question.verb == "down":
            with sock:
                socket_of(directory).unlink(missing_ok=True)
                try:
                    disk.close()
                except OSError as error:
                    channel.refuse(question, error)
                else:
                    channel.answer(question)
            return
        else:
            answer(sock, channel, question)
