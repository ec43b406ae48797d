"""Nothing is left of a disk, whichever of its three processes dies, and nothing waits for ever."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overt.host import mounts, process
from overt.lab import Disk

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

USER = """
import os, sys, time
from overt.lab import Disk
with Disk(sys.argv[1]) as disk:
    print(disk.path, disk.device, disk.server_pid, disk.keeper_pid, flush=True)
    fd = os.open(f"{disk.path}/file", os.O_RDWR | os.O_CREAT)
    os.write(fd, disk.marker * 1000)
    if sys.argv[2] == "hang":
        disk.hang()
    if sys.argv[2] == "fail":
        disk.fail("all")
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(3)
        os._exit(0)
    print("go", flush=True)
    while True:
        try:
            os.write(fd, disk.marker * 1000)
            os.fsync(fd)
        except OSError:
            pass
"""


class Traces:
    """What is on the machine while a disk is there. A loop device is told from its successors by its diskseq."""

    def __init__(self, path: str, device: str, *pids: int) -> None:
        self.path = path
        self.pids = pids
        self.block = Path("/sys/block") / os.path.basename(device)
        self.diskseq = (self.block / "diskseq").read_text()

    @classmethod
    def of(cls, disk: Disk) -> "Traces":
        return cls(disk.path, disk.device, disk.server_pid, disk.keeper_pid)

    def left(self) -> list[str]:
        found = [f"process {pid}" for pid in self.pids if alive(pid)]
        if self.attached():
            found.append(str(self.block))
        if f" {self.path} " in Path("/proc/self/mountinfo").read_text():
            found.append(f"a mount on {self.path}")
        if os.path.exists(self.path):
            found.append(self.path)
        return found

    def attached(self) -> bool:
        return (self.block / "loop/backing_file").exists() and (self.block / "diskseq").read_text() == self.diskseq


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def told(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


@pytest.fixture
def user() -> Iterator[Callable[[str, str], tuple["subprocess.Popen[str]", Traces]]]:
    """Start a process that makes a disk and keeps writing to it."""
    started: list[subprocess.Popen[str]] = []

    def start(filesystem: str, habit: str) -> tuple["subprocess.Popen[str]", Traces]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", USER, filesystem, habit]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(child)
        assert child.stdout
        path, device, *pids = child.stdout.readline().split()
        assert child.stdout.readline() == "go\n"
        return child, Traces(path, device, *map(int, pids))

    yield start
    for child in started:
        child.kill()
        child.wait(20)
        assert child.stdout
        child.stdout.close()


@pytest.mark.parametrize("habit", ["write", "fail", "hang"])
@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs"])
def test_a_user_killed_in_the_middle_leaves_nothing(user: Any, filesystem: str, habit: str) -> None:
    child, traces = user(filesystem, habit)
    time.sleep(0.2)
    assert len(traces.left()) == 5
    child.kill()
    child.wait(15)
    assert eventually(lambda: not traces.left()), traces.left()


def test_a_child_that_inherited_the_disk_does_not_keep_it(user: Any) -> None:
    child, traces = user("ext4", "fork")
    child.kill()
    child.wait(15)
    assert eventually(lambda: not any("process" in trace or "mount" in trace for trace in traces.left()), 2.5)
    assert eventually(lambda: not traces.left()), traces.left()  # its open file held the loop device


def test_a_disk_closed_takes_everything_along() -> None:
    with Disk("ext4") as disk:
        traces = Traces.of(disk)
        assert len(traces.left()) == 5
    assert traces.left() == []


def test_when_the_server_is_killed_its_users_get_errors_and_close_cleans_up() -> None:
    with Disk("ext4") as disk:
        traces = Traces.of(disk)
        file = os.open(f"{disk.path}/file", os.O_RDWR | os.O_CREAT)
        try:
            os.write(file, b"x" * 4096)
            os.kill(disk.server_pid, signal.SIGKILL)
            assert told(lambda: os.fsync(file)) == errno.EIO
        finally:
            os.close(file)
        with pytest.raises(ConnectionResetError, match="has ended"):
            disk.counters()
    assert traces.left() == []


def test_a_server_that_is_stopped_does_not_hold_up_close() -> None:
    disk = Disk("ext4")
    traces = Traces.of(disk)
    Path(f"{disk.path}/file").write_bytes(b"x" * 4096)
    os.kill(disk.server_pid, signal.SIGSTOP)
    disk.close()
    assert traces.left() == []


def test_when_the_keeper_is_killed_close_cleans_up() -> None:
    with Disk("ext4") as disk:
        traces = Traces.of(disk)
        os.kill(disk.keeper_pid, signal.SIGKILL)
        assert eventually(lambda: not alive(disk.server_pid))
    assert eventually(lambda: not traces.left()), traces.left()


@pytest.mark.parametrize("fault", ["all", "flush", "read", "hang"])
@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs"])
def test_a_disk_with_a_fault_and_dirty_pages_can_be_closed(filesystem: str, fault: str) -> None:
    with Disk(filesystem) as disk:
        traces = Traces.of(disk)
        Path(f"{disk.path}/file").write_bytes(disk.marker * 10000)
        disk.hang() if fault == "hang" else disk.fail(fault)
    assert traces.left() == []


def test_a_disk_that_the_user_unmounted_can_be_closed() -> None:
    with Disk("ext4") as disk:
        traces = Traces.of(disk)
        mounts.umount(disk.path)
    assert traces.left() == []


def test_a_mount_stacked_on_the_disk_goes_with_it() -> None:
    with Disk("ext4") as disk:
        traces = Traces.of(disk)
        mount = mounts.new_mount("tmpfs", [])
        mounts.attach(mount, disk.path)
        os.close(mount)
    assert traces.left() == []


@pytest.mark.parametrize("filesystem", ["ext4", "btrfs"])
def test_a_mount_of_somebody_elses_in_its_place_stays(filesystem: str, tmp_path: Path) -> None:
    """The kernel gives it the id of the one that has gone, and to a tmpfs that of a btrfs has its number too."""
    with Disk(filesystem, directory=tmp_path) as disk:
        mounts.umount(disk.path)
        mount = mounts.new_mount("tmpfs", [])
        mounts.attach(mount, disk.path)
        os.close(mount)
        (tmp_path / "theirs").touch()
    try:
        assert (tmp_path / "theirs").exists()
    finally:
        if os.path.ismount(tmp_path):
            mounts.umount(tmp_path)


@pytest.mark.parametrize("killed", ["nobody", "keeper"])
def test_a_disk_whose_directory_has_another_name_can_be_closed(tmp_path: Path, killed: str) -> None:
    (tmp_path / "one/a place").mkdir(parents=True)
    with Disk("ext4", directory=tmp_path / "one/a place") as disk:
        os.rename(tmp_path / "one", tmp_path / "two")
        if killed == "keeper":
            os.kill(disk.keeper_pid, signal.SIGKILL)
            assert eventually(lambda: not alive(disk.server_pid))
    assert not os.path.ismount(tmp_path / "two/a place")
    assert eventually(lambda: not Path(f"/sys/block/{os.path.basename(disk.device)}/loop/backing_file").exists())


def test_an_open_file_does_not_hold_up_close_and_gets_errors_afterwards() -> None:
    with Disk("ext4") as disk:
        traces = Traces.of(disk)
        file = os.open(f"{disk.path}/file", os.O_RDWR | os.O_CREAT)
    try:
        assert traces.attached()
        os.write(file, b"x" * 4096)
        assert told(lambda: os.fsync(file)) == errno.EIO
    finally:
        os.close(file)
    assert eventually(lambda: not traces.left()), traces.left()


def test_a_container_that_holds_the_mount_does_not_hold_up_close() -> None:
    with Disk("ext4") as disk:
        traces = Traces.of(disk)
        ready, writing = os.pipe()
        child = os.fork()
        if child == 0:
            process.unshare(process.CLONE_NEWNS)
            os.write(writing, b"x")
            time.sleep(30)
            os._exit(0)
        assert os.read(ready, 1) == b"x"
    try:
        assert [trace for trace in traces.left() if not trace.startswith("/sys")] == []
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(writing)
    assert eventually(lambda: not traces.left()), traces.left()


def test_a_forked_child_does_not_close_its_parents_disk() -> None:
    with Disk("ext4") as disk:
        child = os.fork()
        if child == 0:
            try:
                disk.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert disk.counters().writes > 0


def test_a_set_up_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for bad in ({"mkfs_options": ("-Y",)}, {"mount_options": "nonsense"}, {"directory": tmp_path / "nowhere"}):
        with pytest.raises(OSError):
            Disk("ext4", **bad)
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_is_closing_once() -> None:
    disk = Disk("ext4")
    disk.close()
    disk.close()
