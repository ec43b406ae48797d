"""`overt lab`: a disk that stays until it is told to go, or its keeper is killed."""

import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overt.lab import stand

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]


def lab(*words: str, directory: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "overt", "lab", *words], cwd=directory, capture_output=True, text=True, timeout=50,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    done = lab("up", "--fs", "ext4", "--size", "32", str(place))
    assert (done.returncode, done.stderr) == (0, "")
    try:
        yield place
    finally:
        lab("down", str(place))


def write_and_sync(path: Path, data: bytes) -> int:
    """The errno of an fsync."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.write(fd, data)
        os.fsync(fd)
    except OSError as error:
        return error.errno or -1
    finally:
        os.close(fd)
    return 0


def status(place: Path) -> dict[str, object]:
    return dict(json.loads(lab("status", "--json", str(place)).stdout))


def test_one_that_somebody_has_unmounted_is_said_to_be(disk: Path) -> None:
    assert status(disk)["state"] == "well"
    subprocess.run(["umount", disk], check=True, timeout=20)
    assert status(disk)["state"] == "unmounted"


def test_it_is_a_filesystem_that_fails_and_is_well_again(disk: Path) -> None:
    assert write_and_sync(disk / "well", b"x") == 0
    assert lab("fail", "--marker", "PRECIOUS", "--errno", "ENOSPC", str(disk), "data").returncode == 0
    assert write_and_sync(disk / "other", b"y" * 4096) == 0
    assert write_and_sync(disk / "precious", b"PRECIOUS" * 512) == errno.ENOSPC
    found = status(disk)
    assert (found["state"], found["failing"], found["failed_writes"]) == ("failing", ["data ENOSPC"], 1)
    assert lab("heal", str(disk)).returncode == 0
    assert write_and_sync(disk / "precious", b"PRECIOUS" * 512) == 0
    assert status(disk)["state"] == "well"


def test_an_image_of_it_can_be_kept(disk: Path, tmp_path: Path) -> None:
    assert write_and_sync(disk / "kept", b"text that is on the disk") == 0
    assert lab("snapshot", "--durable", str(disk), str(tmp_path / "image")).returncode == 0
    assert b"text that is on the disk" in (tmp_path / "image").read_bytes()


def test_after_down_nothing_is_there_and_one_line_says_so(disk: Path) -> None:
    assert os.path.ismount(disk)
    assert lab("down", str(disk)).returncode == 0
    assert not os.path.ismount(disk)
    done = lab("status", str(disk))
    assert (done.returncode, done.stderr) == (1, f"overt: no disk of the lab is here: {disk}\n")
    assert not stand.socket_of(disk).exists()


def test_a_second_disk_at_the_same_place_is_refused(disk: Path) -> None:
    done = lab("up", str(disk))
    assert done.returncode == 1 and "is here already" in done.stderr
    assert os.path.ismount(disk)


def test_a_keeper_that_is_killed_takes_its_disk_with_it(disk: Path) -> None:
    pid = status(disk)["pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while os.path.ismount(disk):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "no disk" in lab("status", str(disk)).stderr
    assert lab("up", "--size", "32", str(disk)).returncode == 0


def test_a_disk_that_hangs_can_be_healed_while_somebody_pushes(disk: Path) -> None:
    (disk / "file").write_bytes(b"x" * 4096)
    assert lab("hang", "--seconds", "40", str(disk)).returncode == 0
    with subprocess.Popen([sys.executable, "-m", "overt", "lab", "push", str(disk)]) as pushing:
        time.sleep(1)
        begun = time.monotonic()
        assert status(disk)["state"] == "hanging"
        assert pushing.poll() is None
        assert lab("heal", str(disk)).returncode == 0
        assert pushing.wait(20) == 0
        assert time.monotonic() - begun < 10
    assert status(disk)["state"] == "well"


def test_a_hang_that_has_run_out_is_over(disk: Path) -> None:
    assert lab("hang", "--seconds", "1.5", str(disk)).returncode == 0
    assert status(disk)["state"] == "hanging"
    time.sleep(1.5)
    assert status(disk)["state"] == "well"


DYING = """
import os, sys
from overt.lab import stand
class Dying(stand.Channel):
    def ask(self, verb, **values):
        if sys.argv[2] == "waiting":
            self._socket.send(b'[1, "start", {}]')
        else:
            super().ask(verb, **values)
        os._exit(9)
stand.Channel = Dying
stand.up(sys.argv[1], "ext4", 32 << 20, "")
"""


@pytest.mark.parametrize("when", ["waiting", "answered"])
def test_whoever_dies_on_the_way_up_leaves_no_disk(when: str, tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    try:
        command = [sys.executable, "-c", DYING, str(tmp_path), when]
        assert subprocess.run(command, pass_fds=[theirs], timeout=20).returncode == 9
        os.close(theirs)
        assert select.select([ours], [], [], 20)[0]  # whoever was to keep the disk has ended
    finally:
        os.close(ours)
    assert not os.path.ismount(tmp_path)
    assert not stand.socket_of(tmp_path).exists()


def test_a_symlink_is_a_directory_too(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    done = lab("up", "--size", "32", "link", directory=tmp_path)
    try:
        assert (done.returncode, done.stderr) == (0, "")
        assert os.path.ismount(tmp_path / "disk")
        assert status(tmp_path / "link")["directory"] == str(tmp_path / "disk")
    finally:
        assert lab("down", str(tmp_path / "link")).returncode == 0
    assert not os.path.ismount(tmp_path / "disk")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    assert "not a directory" in lab("up", str(tmp_path / "absent")).stderr.lower()
    done = lab("run", "--fail", "data", "--", "true")
    assert done.returncode == 2 and "--marker" in done.stderr
    assert lab("fail", "--errno", "ENOTHING", str(tmp_path)).returncode == 2
    for words in (["run", "--fail", "flush", "--marker", "X", "--", "true"], ["fail", "--marker", "X", str(tmp_path)]):
        done = lab(*words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "--marker tells writes apart" in done.stderr
    assert lab("up", "--size", "9" * 20, str(tmp_path)).returncode == 2


def test_a_relative_path_is_of_the_working_directory(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    done = lab("up", "--size", "32", "disk", directory=tmp_path)
    try:
        assert (done.returncode, done.stderr) == (0, "")
        assert status(place)["directory"] == str(place)
    finally:
        lab("down", str(place))


SYNCER = """
import os
fd = os.open("file", os.O_RDWR | os.O_CREAT)
for number in range(9):
    os.pwrite(fd, b"%d" % number, 0)
    try:
        os.fdatasync(fd)
        print("0")
    except OSError as error:
        print(error.errno)
        break
print(os.getcwd() == os.environ["OVERT_LAB"])
raise SystemExit(7)
"""


def test_a_program_meets_the_fault_at_the_chosen_moment_and_its_exit_status_is_kept(tmp_path: Path) -> None:
    done = lab("run", "--size", "32", "--fail", "flush", "--skip", "4", "--", sys.executable, "-c", SYNCER)
    assert done.returncode == 7
    first, *more = done.stdout.split()
    assert (first, more[-2:]) == ("0", ["5", "True"])
    assert done.stderr.startswith("overt lab: refused") and "exit status 7" in done.stderr


def test_a_fault_after_a_time_and_a_disk_that_recovers() -> None:
    one = "echo PRECIOUS > {0}; sync -d {0}; echo $?"
    script = f"echo a > a; sync -d a; sleep 1; {one.format('b')}; sleep 1; {one.format('c')}"
    done = lab("run", "--size", "32", "--fail", "data", "--marker", "PRECIOUS", "--after", "0.4", "--heal-after", "1",
               "--", "sh", "-c", script)  # fmt: skip
    assert done.stdout.split() == ["1", "0"], done.stderr


def test_a_program_that_is_not_there_is_one_line_and_no_disk_stays() -> None:
    done = lab("run", "--size", "32", "--", "/no/such/program")
    assert done.returncode == 1 and done.stderr.count("\n") == 1


def test_bytes_that_are_no_utf_8_are_a_marker_and_a_name_too(tmp_path: Path) -> None:
    marker = os.fsdecode(b"\xff\xfePRECIOUS")
    writer = "import os; os.write(1, b'\\xff\\xfePRECIOUS' * 400); os.fsync(1)"
    script = f'{sys.executable} -c "{writer}" > file 2> /dev/null; echo $?'
    done = lab("run", "--size", "32", "--fail", "data", "--marker", marker, "--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    place = tmp_path / os.fsdecode(b"disk-\xff")
    place.mkdir()
    assert lab("up", "--size", "32", str(place)).returncode == 0
    try:
        assert lab("fail", "--marker", marker, str(place), "data").stderr == ""
        assert write_and_sync(place / "precious", os.fsencode(marker) * 400) == errno.EIO
        done = lab("status", str(place))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{tmp_path}/disk-\\xff: ext4 on ")
    finally:
        lab("down", str(place))


def test_a_disk_that_has_to_be_larger_says_so(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    done = lab("up", "--fs", "btrfs", "--size", "8", str(place))
    try:
        if "is not installed" in done.stderr:
            pytest.skip(done.stderr)
        assert (done.returncode, done.stderr) == (
            0, "overt lab: --size 8: btrfs takes 128 MiB at least, and gets them\n",
        )  # fmt: skip
        assert status(place)["size"] == 128 << 20
    finally:
        lab("down", str(place))


def test_a_fault_that_cannot_be_made_is_said_when_the_program_has_ended(tmp_path: Path) -> None:
    """Here because what makes it is gone: the program ends that itself."""
    script = "kill -9 $(pgrep -P $PPID overt-lab); sleep 0.6; touch ended"
    done = lab(
        "run",
        "--size",
        "32",
        "--after",
        "0.3",
        "--",
        "sh",
        "-c",
        script.replace("touch ended", f"touch {tmp_path}/ended"),
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "the process that kept this disk has ended" in done.stderr
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_program_ends_with_whoever_runs_it(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "overt", "lab", "run", "--size", "32", "--", "sh", "-c", "echo $$; exec sleep 50"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        program = os.pidfd_open(int(running.stdout.readline()))
        running.send_signal(number)
        assert running.wait(20) == -number
    try:
        assert select.select([program], [], [], 10)[0]
    finally:
        os.close(program)
