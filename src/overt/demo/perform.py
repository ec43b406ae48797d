"""The whole demo: every system in turn, in a worker process, as messages to whoever shows it."""

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from errno import EMFILE, ETIMEDOUT
from typing import NamedTuple

from overt.demo.scenario import STEPS, Progress, Row, rehearse, run
from overt.demo.systems import all_systems
from overt.host.process import in_user_namespace
from overt.lab.worker import working

_SPARE_FILES = 100
_PATIENCE = 90  # seconds between two signs of progress; more than a container is given for an answer


class Begin(NamedTuple):
    """The turn of the next system, after `done` of all systems' `total` steps."""

    system: str
    mount: str
    done: int
    total: int


class Lacking(NamedTuple):
    """What a disk that fails on demand would take, and this machine does not allow: the demo is a rehearsal only."""

    what: str


Message = Begin | Progress | Row | Lacking


def perform(count: int, filesystem: str) -> AbstractContextManager[Iterator[Message]]:
    """Iterate over what happens: perhaps Lacking; for each system Begin, Progress..., Row.

    OSError when the demo cannot go on, which is not the fault of the system at work.
    """
    return working(lambda send: _perform(count, filesystem, send))


def _perform(count: int, filesystem: str, send: Callable[[object], None]) -> None:
    _allow_open_files(count + _SPARE_FILES)
    lacking = _lacking()
    if lacking:
        send(Lacking(lacking))
    signal.signal(signal.SIGALRM, _give_up)

    def tell(progress: Progress) -> None:
        signal.alarm(_PATIENCE)
        send(progress)

    systems = all_systems()
    for number, system in enumerate(systems):
        send(Begin(system.name, system.kind, number * STEPS * count, len(systems) * STEPS * count))
        signal.alarm(_PATIENCE)
        absent = system.missing()
        if absent:
            send(Row(system.name, system.kind, count, outcome="missing", note=absent))
        elif lacking:
            send(rehearse(system, count, tell))
        else:
            send(run(system, filesystem, count, tell))
        signal.alarm(0)


def _give_up(number: int, frame: object) -> None:
    """A server that hangs in a mount is a failure of its system, and must not stop the demo."""
    raise TimeoutError(ETIMEDOUT, f"no progress for {_PATIENCE} s")


def _lacking() -> str | None:
    if in_user_namespace():
        return "loop devices and the mounting of their filesystems, which take root"
    absent = [path for path in ("/dev/fuse", "/dev/loop-control") if not os.access(path, os.R_OK | os.W_OK)]
    return " and ".join(absent) or None


def _allow_open_files(needed: int) -> None:
    """A descriptor for each overlay, or for its container."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise OSError(EMFILE, f"so many containers take {needed} open files, and the limit is {hard} (see ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
