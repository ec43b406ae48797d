"""What is opened, shared and closed."""

import fcntl
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from errno import EIO
from pathlib import Path

import pytest

import overt
from overt.host import mounts
from overt.upper import Upper, Uppers
from overt.upper.eyes import superblock

from .stage import SECONDS, Stage, errnos, flush

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]


def descriptors() -> dict[int, str]:
    """Open descriptors and what they are of."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own
            continue
    return found


def instances() -> list[str]:
    fd = mounts.new_mount("tracefs", [])
    try:
        listing = os.open("instances", os.O_RDONLY, dir_fd=fd)
        try:
            return [name for name in os.listdir(listing) if name.startswith(f"overt-{os.getpid()}-")]
        finally:
            os.close(listing)
    finally:
        os.close(fd)


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_with_the_last_overlay_everything_is_closed(stage: Stage) -> None:
    fds, threads = descriptors(), threading.active_count()
    stage.uppers = Uppers()
    attached = [stage.attach(volatile=bool(number % 2)) for number in range(5)]
    upper = attached[0][0]
    assert all(other is upper for other, _ in attached)
    assert flush(upper) is None
    for _, account in attached:
        upper.detach(account)
    stage.uppers.close()
    assert descriptors() == fds
    assert threading.active_count() == threads
    assert instances() == []
    assert (upper.eyes, stage.uppers.known) == ("", {})


def test_nothing_stays_on_the_upper_and_in_the_mount_table(stage: Stage) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    upper, _ = stage.attach("one")
    assert upper.eyes == "probes+trace"
    assert sorted(os.listdir(stage.root / "one")) == ["upper", "work"]
    assert os.listdir(stage.root / "one" / "work") == os.listdir(stage.root / "one" / "upper") == []
    assert Path("/proc/self/mountinfo").read_text() == before


def test_no_descriptor_survives_exec(ext4: Stage) -> None:
    before = descriptors()
    ext4.attach()
    new = set(descriptors()) - set(before)
    assert len(new) >= 4
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in new)


def test_an_upper_has_a_second_life_with_a_ledger_of_its_own(ext4: Stage) -> None:
    upper, account = ext4.attach()
    ext4.lose("victim")
    upper.check()
    upper.detach(account)
    again, account = ext4.attach()
    assert (again is not upper, errnos(again), account.errors()) == (True, [5], [])
    assert [error.source for error in again.ledger.errors] == ["standing"]
    assert ext4.host() == 5


def test_an_upper_that_was_got_and_never_attached_holds_nothing(ext4: Stage) -> None:
    before = descriptors()
    fd = os.open(ext4.root, os.O_RDONLY)
    upper = ext4.uppers.get(fd, fd)
    os.close(fd)
    assert (upper.eyes, descriptors()) == ("", before)


def test_an_attach_that_fails_holds_nothing(ext4: Stage) -> None:
    before = descriptors()
    fd = os.open(ext4.root, os.O_RDONLY)
    bad = os.open("/dev/null", os.O_RDONLY)
    upper = ext4.uppers.get(bad, fd)
    with pytest.raises(OSError, match="Not a directory"):
        upper.attach("", volatile=False)
    os.close(bad)
    os.close(fd)
    ext4.uppers.close()
    assert descriptors() == before


def test_the_mount_that_the_upper_was_found_through_is_not_kept_busy(ext4: Stage, tmp_path: Path) -> None:
    through = tmp_path / "bind"
    through.mkdir()
    subprocess.run(["mount", "--bind", ext4.disk.path, through], check=True)
    (through / "upper").mkdir()
    (through / "work").mkdir()
    fds = [os.open(through / part, os.O_RDONLY) for part in ("upper", "work")]
    upper = ext4.uppers.get(*fds)
    account = upper.attach("", volatile=False)
    other, _ = ext4.attach()
    for fd in fds:
        os.close(fd)
    assert other is upper
    upper.detach(account)
    subprocess.run(["umount", through], check=True)
    ext4.lose("victim")
    upper.check()
    assert errnos(upper) == [5]


def test_subvolumes_of_one_btrfs_are_one_upper(btrfs: Stage) -> None:
    found = set()
    for name in ("a", "b"):
        subprocess.run(["btrfs", "-q", "subvolume", "create", btrfs.root / name], check=True)
        upper, _ = btrfs.attach(under=btrfs.root / name)
        found.add(upper)
    assert os.stat(btrfs.root / "a").st_dev != os.stat(btrfs.root / "b").st_dev
    assert len(found) == 1
    mountinfo = Path("/proc/self/mountinfo").read_text()
    line = next(line for line in mountinfo.splitlines() if line.split()[4] == btrfs.disk.path)
    assert f"{os.major(upper.s_dev)}:{os.minor(upper.s_dev)}" == line.split()[2]


def test_the_superblock_is_found_through_a_detached_mount(btrfs: Stage) -> None:
    fd = mounts.clone(btrfs.disk.path)
    plain = os.open(btrfs.root, os.O_RDONLY)
    try:
        assert superblock(fd) == superblock(plain)
    finally:
        os.close(fd)
        os.close(plain)


def test_unmounting_does_not_wait_for_a_flush_that_hangs(ext4: Stage) -> None:
    fds = descriptors()
    ext4.uppers = Uppers()
    upper, account = ext4.attach()
    answers: list[OSError | None] = []
    ext4.write("file")
    ext4.disk.hang()
    upper.flush(answers.append)
    assert eventually(lambda: upper.flushes == 1)
    began = time.perf_counter()
    upper.detach(account)
    ext4.uppers.close()
    assert time.perf_counter() - began < 1
    assert not answers
    ext4.disk.resume()
    assert eventually(lambda: answers == [None])
    assert eventually(lambda: descriptors() == fds and instances() == [])


def test_an_upper_that_hangs_at_its_first_look_keeps_nobody_from_another(ext4: Stage, btrfs: Stage) -> None:
    """Where an error stands unseen, and there is no tracepoint, the first look has to flush."""
    ext4.uppers = btrfs.uppers = Uppers(trace=False)
    other, _ = btrfs.attach()
    ext4.lose("standing")
    ext4.write("dirty")
    ext4.disk.hang()
    attached: list[Upper] = []
    thread = threading.Thread(target=lambda: attached.append(ext4.attach()[0]))
    thread.start()
    try:
        thread.join(0.5)
        began = time.perf_counter()
        again, account = btrfs.attach()
        again.check()
        again.detach(account)
        assert (again, time.perf_counter() - began < 2) == (other, True)
        assert thread.is_alive()
    finally:
        ext4.disk.resume()
        thread.join(SECONDS)
    assert [errnos(upper) for upper in attached] == [[5]]


def test_the_last_overlay_may_go_from_within_an_answer(ext4: Stage) -> None:
    upper, account = ext4.attach()
    gone = threading.Event()

    def done(failure: OSError | None) -> None:
        upper.detach(account)
        gone.set()

    upper.flush(done)
    assert gone.wait(SECONDS)
    assert eventually(lambda: not any(thread.name.startswith("flush-") for thread in threading.enumerate()))


def test_overlays_come_and_go_while_others_flush_and_check(ext4: Stage) -> None:
    ended = threading.Event()
    failures: list[BaseException] = []

    def come_and_go(name: str) -> None:
        try:
            for number in itertools.count():
                if ended.is_set():
                    break
                upper, account = ext4.attach(f"{name}-{number}", volatile=True)
                upper.check()
                assert flush(upper) is None
                upper.detach(account)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=come_and_go, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    ended.set()
    for thread in threads:
        thread.join(SECONDS)
    assert failures == []
    assert ext4.uppers.known == {}


def test_an_instance_of_the_tracer_left_by_a_dead_process_is_removed(ext4: Stage) -> None:
    fd = mounts.new_mount("tracefs", [])
    child = subprocess.Popen(["true"])
    child.wait(SECONDS)
    name = f"instances/overt-{child.pid}-1"
    os.mkdir(name, dir_fd=fd)
    try:
        ext4.attach()
        with pytest.raises(FileNotFoundError):
            os.stat(name, dir_fd=fd)
    finally:
        os.close(fd)


IN_A_USER_NAMESPACE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from overt.upper import Upper, Uppers
os.chdir(sys.argv[2])
os.mkdir("upper")
os.mkdir("work")
uppers = Uppers()
upper = uppers.get(os.open("upper", os.O_RDONLY), os.open("work", os.O_RDONLY))
account = upper.attach("", volatile=False)
upper.check()
print(upper.eyes, upper.refused, uppers.untraced.errno, os.listdir("work"))
upper.detach(account)
"""


def test_in_a_user_namespace_there_are_probes_but_no_tracepoint(tmp_path: Path) -> None:
    source = str(Path(overt.__file__).parent.parent)
    script = 'mount -t tmpfs none "$3" && exec "$0" -c "$1" "$2" "$3"'
    command = ["unshare", "-Urm", "sh", "-c", script, sys.executable, IN_A_USER_NAMESPACE, source, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (ran.stdout, ran.stderr) == ("probes  1 []\n", "")


@pytest.mark.parametrize("others", [0, 1])
def test_an_error_of_the_flush_with_which_the_flushing_probe_goes_is_heard_of(stage: Stage, others: int) -> None:
    """It goes with the last ordinary overlay; the host's pages are flushed then too."""
    volatile = [stage.attach(volatile=True)[1] for _ in range(others)]
    upper, account = stage.attach()
    stage.write("hosts")
    stage.disk.fail("data")
    upper.detach(account)
    stage.disk.heal()
    assert [error.errno for error in stage.heard] == [EIO]
    for each in volatile:
        assert each.sticky() == EIO
        upper.detach(each)


def test_and_if_a_flush_was_under_way_then(ext4: Stage) -> None:
    """It goes after that one."""
    upper, account = ext4.attach()
    (ext4.root / "first").write_bytes(b"x" * 4096)
    ext4.disk.fail("data")
    ext4.disk.hang(20)
    answers: list[OSError | None] = []
    upper.flush(answers.append)
    time.sleep(0.3)
    ext4.write("second")
    upper.detach(account)
    ext4.disk.resume()
    assert eventually(lambda: [error.errno for error in ext4.heard] == [EIO])
    assert answers == [None]
    ext4.disk.heal()
