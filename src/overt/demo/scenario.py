"""The scenario of the thread: many overlays on one upper filesystem, one writeback error, and everybody asks.

Each system gets a fresh disk, with N upper directories and a lower one that they share, and N containers. Each
container opens its root (the "old fd") and writes a file of its own, which is on the disk before anything fails. Then
the first container, the victim, writes one block more, and the disk refuses it. The kernel finds that out when it
writes the block back: nobody is in a call that could return the error, and the data is gone. The disk is healed, and
works from then on.

Now every container asks, twice on each descriptor: syncfs on a new fd, syncfs on the old one, fsync of its own file.
Last, the victim asks with fsync on the fd that wrote what was lost. They ask one after the other: what is counted is
who is told, and that shall not depend on a race.

The witness is a descriptor of the plain upper, opened before all this. None of the systems owns it or can move its
cursor, so if syncfs on it gives no error, there was none, nobody could have been told, and the run is void. It is asked
last: asking marks the error as seen, which others would notice.
"""

import errno
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from overt.demo.containers import BLOCK, Container, Life, contain
from overt.demo.systems import Layers, Service, System
from overt.host import files, mounts
from overt.lab import Disk

Counts = tuple[int, int]

STEPS = 5  # of each overlay: it is mounted, its container starts, and is asked three things


class Row(NamedTuple):
    """What became of one system. Counts are of containers told, at the first and the second call."""

    system: str
    mount: str  # "ordinary" or "volatile"
    containers: int
    new_fd: Counts | None = None
    old_fd: Counts | None = None
    fsync: Counts | None = None
    victim_fsync: Counts | None = None
    mount_seconds: float | None = None
    server_rss_bytes: int | None = None  # Pss, which counts shared pages once, of all processes that serve the mounts
    # or "void", "failed", "missing" (not on this machine), "blind" (asking shows nothing on this kernel), "rehearsed"
    # (nothing was asked)
    outcome: str = "asked"
    note: str | None = None  # why, or what was odd


class Progress(NamedTuple):
    """`steps` more of a system's STEPS * N are done."""

    stage: str
    steps: int


Tell = Callable[[Progress], None]


def run(system: System, filesystem: str, count: int, tell: Tell) -> Row:
    """Put one system on a fresh disk through it. What the system fails at is a note in its row; OSError: the disk."""
    # For each container some inodes and blocks, and room to spare: memory is used for what is written only.
    with Disk(filesystem, size=(256 << 20) + count * (256 << 10)) as disk:
        try:
            return _run(system, disk, count, tell)
        except OSError as error:
            return Row(system.name, system.kind, count, outcome="failed", note=f"failed: {error.strerror or error}")


def rehearse(system: System, count: int, tell: Tell) -> Row:
    """As much of it as goes without a disk that fails: overlays are mounted, containers start, nothing is asked."""
    try:
        with (
            _tmpfs() as path,
            _overlays(system, path, count, tell) as (overlays, _, row),
            _contained(overlays, path, b"", tell),
        ):
            return row._replace(outcome="rehearsed", note="not asked")
    except OSError as error:
        why = f"not even mounted: {error.strerror or error}"
        return Row(system.name, system.kind, count, outcome="rehearsed", note=why)


def _run(system: System, disk: Disk, count: int, tell: Tell) -> Row:
    unlucky = (disk.marker * BLOCK)[:BLOCK]
    with (
        _opened(disk.path) as witness,
        _opened(disk.path) as upper,
        _overlays(system, disk.path, count, tell) as (overlays, service, row),
        _contained(overlays, disk.path, unlucky, tell, service.guard) as containers,
    ):
        why = service.blind()
        if why is not None:
            return row._replace(outcome="blind", note=why)
        service.await_containers(count)
        files.syncfs(upper)
        disk.fail("data")
        containers[0].ask(Life.lose)
        disk.push()
        disk.heal()
        new_fd, old_fd, fsync = (
            _ask(containers, question, what, tell)
            for question, what in (
                (Life.new_fd, "syncfs, new fd"),
                (Life.old_fd, "syncfs, old fd"),
                (Life.fsync, "fsync"),
            )
        )
        victim_fsync = [containers[0].ask(Life.victim_fsync)]
        if not _tells(witness):
            return row._replace(outcome="void", note="void: the witness on the plain upper saw no error")
        odd = {code for answer in (*new_fd, *old_fd, *fsync, *victim_fsync) for code in answer} - {0, errno.EIO}
        return row._replace(
            new_fd=_told(new_fd),
            old_fd=_told(old_fd),
            fsync=_told(fsync),
            victim_fsync=_told(victim_fsync),
            server_rss_bytes=max(row.server_rss_bytes or 0, _pss(service.pids())),
            note=f"some were answered {', '.join(errno.errorcode[code] for code in sorted(odd))}" if odd else None,
        )


@contextmanager
def _overlays(system: System, path: str, count: int, tell: Tell) -> Iterator[tuple[list[int], Service, Row]]:
    """Mount `count` overlays; their descriptors, which whoever uses them takes from the list, and the row so far."""
    all_layers = [_lay_out(path, number) for number in range(count)]
    step = _stepper("mounting", count, tell)
    overlays: list[int] = []
    with system.serve() as service:
        try:
            began = time.monotonic()
            for layers in all_layers:
                overlays.append(service.mount(layers))
                step()
            seconds = time.monotonic() - began
            memory = _pss(service.pids())
            row = Row(system.name, system.kind, count, mount_seconds=round(seconds, 4), server_rss_bytes=memory)
            yield overlays, service, row
        finally:
            for overlay in overlays:
                os.close(overlay)


@contextmanager
def _contained(
    overlays: list[int], path: str, unlucky: bytes, tell: Tell, guard: str | None = None
) -> Iterator[list[Container]]:
    root = f"{path}/root"
    os.mkdir(root)
    with contain(overlays, root, unlucky, _stepper("starting containers", len(overlays), tell), guard) as containers:
        yield containers


def _lay_out(path: str, number: int) -> Layers:
    lower = f"{path}/lower"
    if number == 0:
        os.mkdir(lower)
        Path(lower, "etc").mkdir()
        Path(lower, "etc/motd").write_text("This file is the same in every container.\n")
    layers = Layers(lower, f"{path}/{number}/upper", f"{path}/{number}/work")
    os.makedirs(layers.upper)
    os.mkdir(layers.work)
    return layers


def _ask(containers: list[Container], question: Callable[[Life], list[int]], what: str, tell: Tell) -> list[list[int]]:
    step = _stepper(what, len(containers), tell)
    answers = []
    for container in containers:
        answers.append(container.ask(question))
        step()
    return answers


def _told(answers: list[list[int]]) -> Counts:
    first, second = (sum(answer[call] == errno.EIO for answer in answers) for call in (0, 1))
    return first, second


def _tells(witness: int) -> bool:
    try:
        files.syncfs(witness)
    except OSError:
        return True
    return False


def _pss(pids: list[int]) -> int:
    """Bytes of memory of these processes; what they share is counted once (proc(5), smaps_rollup)."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) << 10
    return total


def _stepper(stage: str, count: int, tell: Tell) -> Callable[[], None]:
    """A function to call after each of `count` steps; a hundredth of the calls is passed on, and the last."""
    every = max(1, count // 100)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if done % every == 0 or done == count:
            tell(Progress(stage, (done - 1) % every + 1))

    return step


@contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _tmpfs() -> Iterator[str]:
    """An upper for those who may mount nothing else; in a mount namespace that goes with its process."""
    path = tempfile.mkdtemp(prefix="overt-demo-")
    try:
        mounts.attach(mounts.new_mount("tmpfs", []), path)
        try:
            yield path
        finally:
            mounts.umount(path, mounts.MNT_DETACH)
    finally:
        os.rmdir(path)
