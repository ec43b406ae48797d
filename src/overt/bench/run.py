"""One interleaved run.

    for each workload                  its layers are built once
        for each round
            for each system            in an order that moves on by one each round
                a fresh upper, a fresh server, mount, measure, unmount, stop, write everything back

What disturbs a machine (a neighbour, a thermal limit, a growing cache) comes and goes in seconds and minutes. Systems
measured one after another would each meet another weather; in a round they meet the same, so medians over rounds can
be compared, and the ratio is worth more than the value.

A system that fails, or does not answer in time, fails that workload: it is said so in the table and is not tried again.
"""

import contextlib
import errno
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from overt.bench import disk, tools
from overt.bench.meter import available_bytes
from overt.bench.sample import Reading, Sample, Scale
from overt.bench.systems import SYSTEMS, Layers, System, kill
from overt.bench.workloads import WORKLOADS, Workload
from overt.host import mounts
from overt.host.process import CLONE_NEWNS, unshare

ANSWER = 600.0
"""Seconds that a sample may take before its server is killed."""


class Result(NamedTuple):
    """One sample's readings, or why there are none."""

    rows: tuple[str, ...]
    system: str
    readings: tuple[Reading, ...]
    error: str | None = None


def choose(only: Sequence[str]) -> list[Workload]:
    """The workloads that measure the rows in `only` (all if there are none)."""
    return [workload for workload in WORKLOADS if not only or set(workload.rows) & set(only)]


def steps(workloads: Sequence[Workload], systems: Sequence[str], rounds: int) -> int:
    """How many samples a run takes."""
    return sum(min(rounds, workload.rounds or rounds) for workload in workloads) * len(systems)


def run(
    workloads: Sequence[Workload],
    systems: Sequence[str],
    rounds: int,
    scale: Scale,
    about_to: Callable[[str, str], None],
) -> Generator[Result, None, None]:
    """Run and yield a result for each sample; `about_to` is called before each with its row and its system.

    The calling process moves into a mount namespace of its own, for good. Raises OSError where there is not enough
    memory, or no permission to mount.
    """
    needed = (scale.disk << 20) * 3 // 2  # the page cache of the copied file, and of a FUSE server's
    if available_bytes() < needed:
        raise OSError(errno.ENOMEM, f"{needed >> 20} MiB of free memory are needed; try --quick")
    unshare(CLONE_NEWNS)
    mounts.make_private()
    with _end_on_sigterm(), disk.disk(scale.disk << 20) as place:
        for workload in workloads:
            layers = _build(workload, place, systems, scale)
            failed = set()
            for turn in range(min(rounds, workload.rounds or rounds)):
                first = turn % len(systems)
                for name in (*systems[first:], *systems[:first]):
                    about_to(workload.rows[0], name)
                    if name in failed:
                        continue
                    try:
                        yield Result(workload.rows, name, _measure(workload, SYSTEMS[name], place, layers, scale))
                    except OSError as error:
                        failed.add(name)
                        yield Result(workload.rows, name, (), str(error))
            shutil.rmtree(place / "ext4" / "layers")
            shutil.rmtree(layers.flat)
            disk.settle(place / "ext4")


def _build(workload: Workload, place: Path, systems: Sequence[str], scale: Scale) -> Layers:
    """Make the lower layers, and for the plain filesystem the tree that they merge to."""
    base = place / "ext4"
    (base / "layers").mkdir()
    lowers = workload.build(base / "layers", scale)
    layers = Layers(tuple(lowers), base / "upper", base / "work", base / "flat")
    layers.flat.mkdir()
    if "plain" in systems:
        for lower in reversed(lowers):
            tools.run("cp", "-a", f"{lower}/.", layers.flat)
        workload.prime(layers.flat, scale)
    disk.settle(base)
    return layers


def _measure(workload: Workload, kind: type[System], place: Path, layers: Layers, scale: Scale) -> tuple[Reading, ...]:
    """Take one sample. Raises OSError."""
    with contextlib.ExitStack() as undo:
        undo.callback(disk.settle, place / "ext4")
        for directory in (layers.upper, layers.work):
            directory.mkdir()
            undo.callback(shutil.rmtree, directory)
        (place / "m").mkdir(exist_ok=True)
        workload.prime(layers.upper, scale)
        disk.settle(place / "ext4")
        system = kind(place / "memory")
        sample = Sample(system, place, layers, scale)
        late = undo.enter_context(_deadline(system))
        undo.callback(system.stop)
        try:
            if workload.mounted:
                system.start()
                system.mount(layers, sample.target)
            workload.run(sample)
            if workload.mounted:
                system.umount(sample.target)
        except OSError as error:
            if late.is_set():
                raise OSError(f"no answer in {ANSWER:.0f} s") from error
            raise
        finally:
            _clear(place)
        return tuple(sample.readings)


def _clear(place: Path) -> None:
    """Take away the mounts that a sample which failed has left."""
    for line in reversed(Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()):
        target = line.split()[4]
        if target == f"{place}/m" or target.startswith(f"{place}/many/"):
            mounts.umount(target, mounts.MNT_DETACH)


@contextlib.contextmanager
def _deadline(system: System) -> Iterator[threading.Event]:
    """Kill the servers if the block takes too long; the event then is set.

    A call that waits for a FUSE server cannot be interrupted by a handler in Python, but it ends with its server.
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        kill(system)

    timer = threading.Timer(ANSWER, end)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


@contextlib.contextmanager
def _end_on_sigterm() -> Iterator[None]:
    """Let SIGTERM clean up as Ctrl-C does."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
