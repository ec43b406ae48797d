"""Whether containers are really protected: one is run, its disk loses a write, and it asks.

The container's overlay is on a disk of the lab's (overt.lab), which fails on demand. podman, runc, crun and containerd
take a mounted overlay as a container's root; docker makes its own, and gets this one as a volume. Programs in the
container are the host's.

Where the lab cannot make a disk (no FUSE, no loop devices), the overlay is on an ordinary directory. Then the check
says that the guard answers, and not that it tells.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from overt.guard import runners, supervisor
from overt.guard.runners import Runner, RunnerError
from overt.host import mounts
from overt.lab import Disk

_SIZE = 64 << 20
_PATIENCE = 10.0
"""seconds for the guard to take the container, and for the overlay to be let go"""
_TOLD = "Input/output error"
_ANSWERED = "syncfs is answered"


class Step(NamedTuple):
    """One thing that was looked at."""

    name: str
    ok: bool | None
    """None: it could not be tried"""
    why: str


class Report(NamedTuple):
    """What was found. `steps` ends with the first that failed."""

    engine: str
    steps: list[Step]

    @property
    def protected(self) -> bool | None:
        """No step has failed, and the container was seen to ask; None: there was no container, so nobody knows."""
        if any(step.ok is False for step in self.steps):
            return False
        return True if any(step.name == _ANSWERED for step in self.steps) else None


def check(engine: str, socket: Path, runtime: str | None) -> Report:
    """Run a container of `engine` (a row of runners.ENGINES), and see. OSError if nothing can be mounted here.

    `runtime`: a runtime's name in docker's or podman's configuration, None for the default.
    """
    steps: list[Step] = []
    for name, ok, why in _steps(engine, socket, runtime):
        steps.append(Step(name, ok, why))
        if ok is False:
            break
    return Report(engine, steps)


def _steps(engine: str, socket: Path, runtime: str | None) -> Iterator[tuple[str, bool | None, str]]:
    name = "a guard runs"
    try:
        supervisor.ask(socket)
    except OSError as error:
        yield name, False, f"{socket}: {error.strerror}"
        return
    yield name, True, f"it listens on {socket}"
    with ExitStack() as stack:
        disk: Disk | None = None
        why = ""
        try:
            disk = stack.enter_context(Disk("ext4", _SIZE))
            place = Path(disk.path)
        except OSError as error:
            why = f"no disk of the lab's: {error}"
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overt-check-", dir="/var/tmp")))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overt-check-")))
        root = stack.enter_context(_overlay(scratch, place))
        runner = runners.make(engine, scratch, root, str(socket), runtime)
        yield from _in_container(stack, runner, root, socket, place / "upper", disk, why)


def _in_container(
    stack: ExitStack, runner: Runner, root: Path, socket: Path, upper: Path, disk: Disk | None, why: str
) -> Iterator[tuple[str, bool | None, str]]:
    name = "a container starts"
    stack.callback(runner.stop)
    try:
        runner.start()
    except RunnerError as error:
        yield name, None, str(error)
        return
    yield name, True, runner.what
    name = "the guard has its listener"
    if not _wait(lambda: _overlay_in(supervisor.ask(socket), upper) is not None):
        yield name, False, f"its seccomp profile does not hand syncfs over to {socket}{runner.advice()}"
        return
    if not _wait(lambda: bool((_overlay_in(supervisor.ask(socket), upper) or {}).get("guarded"))):
        yield name, False, 'it cannot find the upper of the container\'s overlay (see its log: "not guarded")'
        return
    yield name, True, "for its overlay"
    status, said = runner.sync()
    yield _ANSWERED, status == 0, said or "0, as nothing was lost"
    name = "a lost write is told"
    if disk is None:
        yield name, None, why
        return
    disk.fail("data")
    with open(root / "lost", "wb") as file:
        file.write(disk.marker * 256)
    disk.push()
    disk.heal()
    status, said = runner.sync()
    yield name, status == 1 and _TOLD in said, said or "syncfs returned 0 after the disk had lost a page"
    status, said = runner.sync()
    yield "once", status == 0, said or "the next syncfs returned 0"


def _overlay_in(status: dict[str, Any], upper: Path) -> dict[str, Any] | None:
    return next((each for each in status["overlays"] if each["upperdir"] == str(upper)), None)


@contextmanager
def _overlay(scratch: Path, place: Path) -> Iterator[Path]:
    """A kernel overlay with its upper on `place`, mounted."""
    lower, root = scratch / "lower", scratch / "root"
    for part in ("proc", "dev", "sys", "tmp", "etc", "run"):
        (lower / part).mkdir(parents=True)
    for directory in (root, place / "upper", place / "work"):
        directory.mkdir()
    options = [("lowerdir", str(lower)), ("upperdir", str(place / "upper")), ("workdir", str(place / "work"))]
    fd = mounts.new_mount("overlay", options)
    try:
        mounts.attach(fd, str(root))
    finally:
        os.close(fd)
    try:
        yield root
    finally:
        _wait(lambda: _unmount(root))
        if os.path.ismount(root):
            mounts.umount(str(root), mounts.MNT_DETACH)
        shutil.rmtree(place / "work", ignore_errors=True)


def _unmount(root: Path) -> bool:
    try:
        mounts.umount(str(root))
    except OSError:
        return False
    return True


def _wait(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
