"""A process in which a command does its work: in a mount namespace of its own, and without the terminal.

Everything that the command makes is made by this process and is gone with it, mounts above all. It tells its parent,
who has the terminal, how far it is. Ctrl-C reaches the parent only (the worker is a session of its own, and so are the
servers that it starts): the parent asks the worker to stop, with SIGTERM, and waits until it has tidied up. If the
parent dies otherwise, the kernel sends that signal.

Without root the worker enters a user namespace first, and is root in there.
"""

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import ECHILD, EPERM
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn

from overt.host import mounts, process
from overt.lab import bounded

_GRACE = 60.0  # seconds to tidy up


class Stopped(BaseException):
    """SIGTERM: unwind, tidy up."""


@contextmanager
def working(work: Callable[[Callable[[object], None]], None]) -> Iterator[Iterator[Any]]:
    """Have a worker do `work`, which is given a function that sends (any object that pickles), and iterate over that.

    An OSError of the worker's is raised by the iteration; what is no OSError is printed by the worker and becomes one.
    """
    receiver, sender = Pipe(duplex=False)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        receiver.close()
        _work(work, sender, parent)
    sender.close()
    try:
        with receiver:
            yield _received(receiver)
    finally:
        os.kill(pid, signal.SIGTERM)
        if bounded.wait(pid, _GRACE) is None:
            os.kill(pid, signal.SIGKILL)
            raise TimeoutError(ECHILD, f"the worker did not tidy up in {_GRACE:g} s, and was killed")


def _received(receiver: Connection) -> Iterator[Any]:
    while True:
        try:
            message = receiver.recv()
        except EOFError:
            raise ChildProcessError(ECHILD, "the process that does the work died") from None
        if message is None:
            return
        if isinstance(message, OSError):
            raise message
        yield message


def _work(work: Callable[[Callable[[object], None]], None], sender: Connection, parent: int) -> NoReturn:
    try:
        stop_on_sigterm()
        os.setsid()
        process.die_with_parent(signal.SIGTERM)
        try:
            if os.getppid() == parent:  # else it died before it could be said what should happen then
                _enter_private_namespaces()
                work(sender.send)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sender.send(None)
    except OSError as error:
        with suppress(BrokenPipeError):  # that may be the very error: the parent has gone
            sender.send(error)
    except Stopped:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def stop_on_sigterm() -> None:
    """Have SIGTERM raise Stopped in this process, once."""
    signal.signal(signal.SIGTERM, _stop)


def _stop(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped


def _enter_private_namespaces() -> None:
    try:
        process.unshare(process.CLONE_NEWNS)
    except OSError as error:
        if error.errno != EPERM:
            raise
        uid, gid = os.geteuid(), os.getegid()
        process.unshare(process.CLONE_NEWUSER | process.CLONE_NEWNS)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    mounts.make_private()
