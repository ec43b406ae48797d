"""A program run on a disk that fails at a moment of one's choice: `overt lab run`."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from overt.host import process
from overt.lab.disk import Disk
from overt.lab.image import Counters


class Fault(NamedTuple):
    """What goes wrong, and when."""

    what: str
    """as Disk.fail has it"""
    code: int
    """the errno"""
    marker: bytes | None = None
    after: float = 0.0
    """seconds after the program's start"""
    skip: int = 0
    """and so many of the requests that are meant go well first"""
    heal_after: float | None = None
    """seconds after that; None: it stays"""


class Ended(NamedTuple):
    status: int
    """the program's exit status; 128 and the number of a signal"""
    refused: int
    """requests that the disk has refused"""
    counters: Counters


def run(command: Sequence[str], disk: Disk, fault: Fault) -> Ended:
    """Run `command` in the disk's directory, which it also finds as $OVERT_LAB. OSError if it cannot be started.

    Interrupted, it kills the program: a disk that fails leaves nobody waiting. If this process is killed, the kernel
    does. What goes wrong with the disk meanwhile is raised when the program has ended.
    """
    environment = {**os.environ, "OVERT_LAB": disk.path}
    timers: list[threading.Timer] = []
    trouble: list[Exception] = []

    def at(seconds: float, act: Callable[[], None]) -> None:
        def carefully() -> None:
            try:
                act()
            except Exception as error:
                trouble.append(error)

        timers.append(threading.Timer(seconds, carefully))

    def fail() -> None:
        disk.fail(fault.what, errno=fault.code, marker=fault.marker, skip=fault.skip)

    if fault.after <= 0:
        fail()  # before it starts: nothing can come first
    parent = os.getpid()
    program = subprocess.Popen(command, cwd=disk.path, env=environment, preexec_fn=lambda: _end_with(parent))
    try:
        if fault.after > 0:
            at(fault.after, fail)
        if fault.heal_after is not None:
            at(fault.after + fault.heal_after, disk.heal)
        for timer in timers:
            timer.start()
        status = program.wait()
    except BaseException:
        with suppress(ProcessLookupError):
            program.send_signal(signal.SIGKILL)
        program.wait()
        raise
    finally:
        for timer in timers:
            timer.cancel()
            if timer.ident is not None:
                timer.join()
    if trouble:
        raise trouble[0]
    counters = disk.counters()
    refused = sum(count for name, count in counters._asdict().items() if name.startswith("failed"))
    return Ended(128 - status if status < 0 else status, refused, counters)


def _end_with(parent: int) -> None:
    process.die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be said what should happen then
        os._exit(1)
