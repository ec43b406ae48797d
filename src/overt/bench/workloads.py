"""The workloads: what is in the layers, and what is done with them.

The rod is the same for all systems and is part of every value: Python's os functions for single calls (about 1 us
each), the real program for everything larger (about 1 ms to start one). The plain filesystem's column shows how much
of a value that is.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from overt.bench import meter, tools
from overt.bench.sample import Sample, Scale
from overt.bench.systems import Layers
from overt.bench.trees import checkout, merged, merged_upper, some_files, tarball
from overt.host import files

MICROSECONDS = 1e-6
MILLISECONDS = 1e-3
BLOCK = bytes(range(256)) * 16


class Workload(NamedTuple):
    """Rows that are measured together.

    `build` makes the layers and returns the lowers, topmost first; `prime` puts into an upper (or, for the plain
    filesystem, into its flat copy) what is there before mounting; `run` measures.
    """

    rows: tuple[str, ...]
    build: Callable[[Path, Scale], list[Path]]
    run: Callable[[Sample], None]
    prime: Callable[[Path, Scale], None] = lambda upper, scale: None
    command: str | None = None
    mounted: bool = True
    """Whether the overlay is mounted when `run` begins."""
    rounds: int | None = None
    """At most so many rounds."""


def small_layer(place: Path, scale: Scale) -> list[Path]:
    """One layer with one directory of small files."""
    some_files(place / "top" / "directory", "lower", scale.files, BLOCK)
    return [place / "top"]


def own_files(sample: Sample) -> None:
    """Files that the container makes itself, in a directory that the lower layer has too."""
    names = [os.fsencode(sample.target / "directory" / f"own{number:05}") for number in range(sample.scale.files)]
    per_file = len(names) * MICROSECONDS
    with sample.row("create", per_file):
        for name in names:
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.write(fd, BLOCK)
            os.close(fd)
    with sample.row("open", per_file):
        for name in names:
            fd = os.open(name, os.O_RDONLY)
            os.read(fd, 4096)
            os.close(fd)
    with sample.row("stat-changed") as measured:
        spent = 0
        for name in names:
            fd = os.open(name, os.O_WRONLY)
            os.pwrite(fd, b"x", 4096)
            begin = time.perf_counter_ns()
            os.stat(name)
            spent += time.perf_counter_ns() - begin
            os.close(fd)
        measured.value = spent / 1e9 / per_file
    with sample.row("unlink", per_file):
        for name in names:
            os.unlink(name)


def lower_files(sample: Sample) -> None:
    """Files that come with the image."""
    names = [os.fsencode(sample.target / "directory" / f"lower{number:05}") for number in range(sample.scale.files)]
    per_file = len(names) * MICROSECONDS
    with sample.row("stat", per_file):
        for name in names:
            os.stat(name)
    with sample.row("open-lower", per_file):
        for name in names:
            fd = os.open(name, os.O_RDONLY)
            os.read(fd, 4096)
            os.close(fd)


def listing(sample: Sample) -> None:
    """The overlay is fresh, the filesystem below it warm, as it is for the plain one."""
    for row in ("ls-cold", "ls-warm"):
        with sample.row(row, MILLISECONDS):
            tools.run("ls", "-lR", sample.target)


def package(place: Path, scale: Scale) -> list[Path]:
    """An empty layer, and a tar archive beside it."""
    (place / "top").mkdir()
    tarball(place / "tree.tar", scale.tree)
    return [place / "top"]


def untar(sample: Sample) -> None:
    """A tree is unpacked and removed."""
    tree = sample.target / "tree"
    tree.mkdir()
    with sample.row("untar", MILLISECONDS):
        tools.run("tar", "-xf", sample.layers.lower[0].parent / "tree.tar", "-C", tree)
    with sample.row("rm", MILLISECONDS):
        tools.run("rm", "-rf", tree)


def refresh_index(upper: Path, scale: Scale) -> None:
    """Let the index know the inode numbers of the plain filesystem's copy, as it knows those of the original."""
    if (upper / ".git").exists():
        tools.run("git", "status", cwd=upper)


def git_status(sample: Sample) -> None:
    """The first one finds cold entries, and may find that the index does not know the files' inode numbers."""
    for row in ("git-cold", "git-warm"):
        with sample.row(row, MILLISECONDS):
            changed = tools.output("git", "status", "--porcelain", cwd=sample.target)
        if changed:
            raise OSError(f"git status: {changed.splitlines()[0]}, where nothing was changed")


def data_file(upper: Path, scale: Scale) -> None:
    """A file of the container's own, all its blocks written."""
    fill(upper / "data", scale.fio_size)


def fill(path: Path, mebibytes: int) -> None:
    """Write a file of data that is not zeros."""
    chunk = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(mebibytes):
            file.write(chunk)


def nothing(place: Path, scale: Scale) -> list[Path]:
    """One empty layer."""
    (place / "top").mkdir()
    return [place / "top"]


def fio(row: str, kind: str, block: str) -> Workload:
    """A row of fio, on a file that is in the page cache."""

    def run(sample: Sample) -> None:
        with sample.row(row) as measured:
            printed = tools.output(
                "fio", "--name=bench", f"--filename={sample.target / 'data'}", f"--rw={kind}", f"--bs={block}",
                f"--size={sample.scale.fio_size}m", "--ioengine=psync", "--thread", "--time_based",
                f"--runtime={round(sample.scale.fio_seconds * 1000)}ms", "--fallocate=none", "--invalidate=0",
                "--norandommap", "--gtod_reduce=1", "--output-format=json",
                cwd=sample.place,
            )  # fmt: skip
            job = json.loads(printed[printed.index("{") :])["jobs"][0]
            measured.value = job["write" if "write" in kind else "read"]["bw_bytes"] / (1 << 20)

    return Workload((row,), nothing, run, data_file, command="fio")


def large_layer(place: Path, scale: Scale) -> list[Path]:
    """One layer with one large file."""
    (place / "top").mkdir()
    fill(place / "top" / "large", scale.lower_size)
    return [place / "top"]


def first_write(sample: Sample) -> None:
    """One byte is written to a file that only the lower layer has."""
    path = sample.target / "large"
    with sample.row("first-write", MILLISECONDS):
        if sample.system.name == "plain":
            tools.run("cp", "--reflink=never", path, sample.target / "copy")
        fd = os.open(path, os.O_WRONLY)
        os.pwrite(fd, b"x", 0)
        os.close(fd)
    (sample.target / "copy").unlink(missing_ok=True)


def syncing(sample: Sample) -> None:
    """Medians of calls, because a few meet a commit of the journal."""
    fd = os.open(sample.target / "own", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.pwrite(fd, BLOCK, 0)
        files.syncfs(fd)
        for row, sync, write in (
            ("fsync-clean", os.fsync, False),
            ("syncfs-clean", files.syncfs, False),
            ("fsync", os.fsync, True),
            ("syncfs", files.syncfs, True),
        ):
            with sample.row(row) as measured:
                spent = []
                for _ in range(sample.scale.syncs):
                    if write:
                        os.pwrite(fd, BLOCK, 0)
                    begin = time.perf_counter_ns()
                    sync(fd)
                    spent.append(time.perf_counter_ns() - begin)
                measured.value = statistics.median(spent) / 1000
    finally:
        os.close(fd)


def many(sample: Sample) -> None:
    """Many overlays of one system. A server that serves them all is started within the time that is measured."""
    targets = [sample.place / "many" / str(number) for number in range(sample.scale.mounts)]
    uppers = sample.layers.upper
    stacks = []
    for target in targets:
        upper, work = uppers / target.name, sample.layers.work / target.name
        stacks.append(Layers(sample.layers.lower, upper, work, uppers / target.name))
        for directory in (target, upper, work):
            directory.mkdir(parents=True)
    mounted = []
    try:
        with sample.row("mounts") as measured:
            begin = time.perf_counter()
            sample.system.start()
            for stack, target in zip(stacks, targets, strict=True):
                sample.system.mount(stack, target)
                mounted.append(target)
            measured.value = time.perf_counter() - begin
        with sample.row("memory") as measured:
            measured.value = meter.proportional_bytes(sample.system.pids()) / (1 << 20)
    finally:
        for target in mounted:
            sample.system.umount(target)
        for target in targets:
            target.rmdir()


def idle(sample: Sample) -> None:
    """What a server does when there is nothing to do, once it has done a little."""
    (sample.target / "file").write_bytes(BLOCK)
    os.listdir(sample.target)
    if not sample.system.pids():
        with sample.row("idle") as measured:
            measured.value = 0.0
        return
    time.sleep(0.5)
    before = sample.cpu()
    with sample.row("idle") as measured:
        time.sleep(2)
        measured.value = sample.cpu() - before


WORKLOADS = (
    Workload(("create", "open", "stat-changed", "unlink"), small_layer, own_files),
    Workload(("stat", "open-lower"), small_layer, lower_files),
    Workload(("ls-cold", "ls-warm"), merged, listing, merged_upper),
    Workload(("untar", "rm"), package, untar, command="tar"),
    Workload(("git-cold", "git-warm"), checkout, git_status, refresh_index, command="git"),
    fio("rand-write", "randwrite", "4k"),
    fio("rand-read", "randread", "4k"),
    fio("seq-write", "write", "1m"),
    fio("seq-read", "read", "1m"),
    Workload(("first-write",), large_layer, first_write),
    Workload(("fsync-clean", "syncfs-clean", "fsync", "syncfs"), nothing, syncing),
    Workload(("mounts", "memory"), nothing, many, mounted=False),
    Workload(("idle",), nothing, idle, rounds=1),
)
