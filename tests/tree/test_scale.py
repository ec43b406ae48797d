"""Many names, many look-ups, many open files: what a server keeps of them, and that it lets go."""

import contextlib
import errno
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overt.host import mounts
from overt.host.libc import check, libc
from overt.server.client import Client, Started, start

from .ground import Ground, Layers

pytestmark = pytest.mark.timeout(120)

MS_REMOUNT = 32
PER_NODE = 1100
"""bytes of memory at most for each file that the kernel knows"""
MIB = 1 << 20


class Place:
    """Layers in memory, with a server of their own."""

    def __init__(self, ground: Ground, server: Started) -> None:
        self.client = ground.client
        self.server = server
        self.layers = Layers(ground)

    @property
    def memory(self) -> int:
        """What the server takes, in bytes: what is resident, and its own."""
        fields = Path(f"/proc/{self.server.process.pid}/statm").read_text().split()
        return (int(fields[1]) - int(fields[2])) * resource.getpagesize()

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.server.process.pid}/fd"))

    @property
    def nodes(self) -> int:
        (mount,) = self.client.status()["mounts"]
        return int(mount["nodes"])

    def forget(self) -> None:
        """Have the kernel forget the files of this mount that nobody uses (reconfigure_super)."""
        check(libc.mount(None, os.fsencode(self.layers.path), None, MS_REMOUNT, None))
        wait_until(lambda: self.nodes < 10)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def place() -> Iterator[Place]:
    base = Path(tempfile.mkdtemp(prefix="overt-tree-"))
    base.chmod(0o755)
    mounts.attach(mounts.new_mount("tmpfs", [("mode", "755"), ("nr_inodes", "0")]), base)
    try:
        server = start(str(base / "socket"), log=str(base / "log"))
        try:
            with Client(server.path) as client:
                made = Place(Ground(base, client), server)
                yield made
                made.layers.umount()
                assert not client.status()["events"].get("internal error")
        finally:
            assert server.stop() == 0
    finally:
        mounts.umount(base, mounts.MNT_DETACH)
        base.rmdir()


def fill(directory: Path, first: int, last: int) -> None:
    directory.mkdir(exist_ok=True)
    fd = os.open(directory, os.O_RDONLY)
    try:
        for number in range(first, last):
            os.mknod(f"name-{number:07}", 0o100644, dir_fd=fd)
    finally:
        os.close(fd)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("many", [50_000, pytest.param(500_000, marks=pytest.mark.long)])
def test_a_directory_of_very_many_entries_is_listed_right_and_forgotten(place: Place, many: int) -> None:
    """Half of them in the upper; a third of the lower ones are hidden by what the upper has under their name."""
    layers = place.layers
    fill(layers.lower / "dir", 0, many // 2)
    fill(layers.upper / "dir", many // 3, many)
    expected = {f"name-{number:07}" for number in range(many)}
    directory = layers.mount() / "dir"
    place.client.status()
    before = place.memory
    peaks, rests = [], []
    for _ in range(3):
        names = os.listdir(directory)
        assert len(names) == many
        assert set(names) == expected
        with os.scandir(directory) as entries:
            assert sum(entry.stat().st_size for entry in entries) == 0
        assert place.nodes > many
        peaks.append(place.memory - before)
        place.forget()
        time.sleep(1)  # it is given back a moment later
        rests.append(place.memory - before)
    print(f"{many}: {[peak // many for peak in peaks]} and {[rest // many for rest in rests]} bytes an entry")
    assert max(peaks) < many * PER_NODE + 8 * MIB
    assert rests[-1] < peaks[0] // 4 + 24 * MIB
    assert peaks[-1] < peaks[0] * 5 // 4 + 8 * MIB


@pytest.mark.timeout(600)
@pytest.mark.parametrize("rounds", [4, pytest.param(50, marks=pytest.mark.long)])
def test_look_ups_without_end_take_no_more_memory_than_those_before_them(place: Place, rounds: int) -> None:
    """20,000 names a round, half of which are there."""
    layers = place.layers
    fill(layers.lower / "dir", 0, 5_000)
    fill(layers.upper / "dir", 5_000, 10_000)
    directory = os.open(layers.mount() / "dir", os.O_PATH)
    memory = []
    try:
        for _ in range(rounds):
            for number in range(20_000):
                try:
                    os.stat(f"name-{number:07}", dir_fd=directory)
                    assert number < 10_000
                except FileNotFoundError:
                    assert number >= 10_000
            assert place.nodes > 10_000
            place.forget()
            memory.append(place.memory)
    finally:
        os.close(directory)
    print([each // 1024 for each in memory])
    # 19.4 to 22.9 MiB over fifty rounds, up and down; what stays of every node would be 6 MiB a round.
    assert max(memory[2:]) < max(memory[:2]) + 4 * MIB


# Open files


def test_thousands_of_open_files(place: Place) -> None:
    layers = place.layers
    many = 4_000
    fill(layers.lower / "dir", 0, many)
    for number in range(0, many, 10):
        (layers.lower / "dir" / f"name-{number:07}").write_bytes(b"%d" % number)
    directory = layers.mount() / "dir"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = place.descriptors
    fds: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, many + 1000), hard))
    try:
        for number in range(many):
            fds.append(os.open(directory / f"name-{number:07}", os.O_RDWR if number % 4 == 0 else os.O_RDONLY))
        for number in range(0, many, 20):
            assert os.pread(fds[number], 10, 0) == b"%d" % number
            os.pwrite(fds[number], b"written", 0)
        assert os.listdir(layers.upper / "dir")
        for number in range(0, many, 20):
            assert (directory / f"name-{number:07}").read_bytes() == b"written"
    finally:
        for fd in fds:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    wait_until(lambda: place.descriptors < before + 20)


def test_a_server_that_has_no_more_descriptors_says_so_and_goes_on(place: Place) -> None:
    """EMFILE, to those who need one. Who has a file open goes on with it, and when there is room again all is well."""
    layers = place.layers
    fill(layers.lower / "dir", 0, 300)
    (layers.lower / "dir" / "name-0000000").write_bytes(b"lower")
    directory = layers.mount() / "dir"
    pid = place.server.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    first = os.open(directory / "name-0000000", os.O_RDWR)
    fds = [first]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 20, limits[1]))
    try:
        codes = []
        for number in range(1, 300):
            try:
                fds.append(os.open(directory / f"name-{number:07}", os.O_RDWR if number % 2 else os.O_RDONLY))
            except OSError as error:
                codes.append(error.errno)
        assert len(codes) > 200
        assert set(codes) == {errno.EMFILE}
        others = [Client(place.server.path) for _ in range(30)]  # who has none left for their other ends
        wait_until(lambda: place.client.status()["events"].get("client turned away"))
        for other in others:
            other.close()
        for call in (os.unlink, os.mkdir, lambda path: os.rename(path, directory / "new"), os.listdir, Path.touch):
            with contextlib.suppress(OSError):
                call(directory / "name-0000299")
        assert os.pread(first, 10, 0) == b"lower"
        os.pwrite(first, b"upper", 0)
        assert os.copy_file_range(first, first, 5, 0, 5) == 5
    finally:
        for fd in fds:
            os.close(fd)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert (directory / "name-0000000").read_bytes() == b"upperupper"
    for number in range(1, 290):
        assert (directory / f"name-{number:07}").read_bytes() == b""
    assert sorted(os.listdir(layers.work / "work")) == []
