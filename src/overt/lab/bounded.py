"""Work that may never come back, done by somebody else.

A system call that waits for a stuck disk cannot be interrupted: not by a signal, not even by SIGKILL. So whoever has to
stay alive does not make it, but has a child process make it, and stops waiting at a deadline. The child stays behind
until the disk's connection is aborted.
"""

import errno
import json
import os
import select
import signal
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from overt.lab.channel import explain


def in_child(work: Callable[[], None], seconds: float, rescue: Callable[[], None] | None = None) -> None:
    """Fork, let the child do `work`, and raise the OSError it raised; TimeoutError after `seconds`.

    With `rescue`, which should free whoever waits, the first deadline calls that and the child gets as long again.
    For processes with one thread. Another exception is printed by the child, and is an OSError (EIO) here.
    """
    report = os.memfd_create("report", os.MFD_CLOEXEC)
    try:
        pid = os.fork()
        if pid == 0:
            _work(work, report)
        status = wait(pid, seconds)
        if status is None and rescue:
            rescue()
            status = wait(pid, seconds)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            raise TimeoutError(errno.ETIMEDOUT, f"not done in {seconds:g} s")
        text = os.pread(report, 4096, 0)
        if text:
            code, words = json.loads(text)
            raise OSError(code, words)
        if status:
            raise OSError(errno.EIO, f"a child process ended with status {status}")
    finally:
        os.close(report)


def run(command: Sequence[str], seconds: float) -> None:
    """Run a program (its path first); OSError with its own words when it fails or takes longer than `seconds`."""
    output = os.memfd_create("output", os.MFD_CLOEXEC)

    def execute() -> None:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.execv(command[0], list(command))

    try:
        in_child(execute, seconds)
    except OSError as error:
        words = " ".join(os.pread(output, 400, 0).decode(errors="replace").split())
        raise OSError(error.errno, f"{' '.join(command)}: {error.strerror}{': ' + words if words else ''}") from None
    finally:
        os.close(output)


def wait(pid: int, seconds: float) -> int | None:
    """Wait for a child to end; its exit status (negative: the signal), or None after `seconds`."""
    pidfd = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if not poller.poll(seconds * 1000):
            return None
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _work(work: Callable[[], None], report: int) -> NoReturn:
    status = 1
    try:
        work()
        status = 0
    except OSError as error:
        os.write(report, json.dumps([error.errno or errno.EIO, explain(error)]).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
