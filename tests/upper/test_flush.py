"""Flushing: what it reaches, what it costs for many, and what it is worth on a filesystem that has died."""

import contextlib
import errno
import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from overt.host import mounts
from overt.ledger import Account
from overt.upper import Uppers, probes
from overt.upper.trace import Trace

from .stage import SECONDS, Stage, errnos, flush

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

EIO = errno.EIO


class Crowd:
    """Callers of flush, and what each was answered when."""

    def __init__(self) -> None:
        self.answers: dict[int, OSError | None] = {}
        self.flushes: dict[int, int] = {}
        self.threads: set[int] = set()

    def wait(self, count: int) -> None:
        deadline = time.monotonic() + SECONDS
        while len(self.answers) < count:
            assert time.monotonic() < deadline, f"{len(self.answers)} of {count} were answered"
            time.sleep(0.001)


def fill(stage: Stage) -> None:
    """Leave no block free."""
    fd = os.open(stage.root / "filler", os.O_WRONLY | os.O_CREAT)
    try:
        end = 0
        for size in (1 << 24, 1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(fd, end, size)
                    end += size
    finally:
        os.close(fd)


def test_what_was_written_before_the_call_is_durable_when_it_is_answered(stage: Stage) -> None:
    upper, _ = stage.attach()
    stage.write("file", pages=10)
    assert stage.disk.marker not in stage.disk.snapshot(durable=True)
    assert flush(upper) is None
    assert stage.disk.marker in stage.disk.snapshot(durable=True)


def switches(thread: threading.Thread) -> int:
    """How often it has gone to sleep."""
    with open(f"/proc/self/task/{thread.native_id}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt_switches:"))


def test_a_flush_on_the_callers_thread_wakes_no_other(stage: Stage) -> None:
    upper, _ = stage.attach()
    flush(upper)
    flusher = next(thread for thread in threading.enumerate() if thread.name.startswith("flush-"))
    before = switches(flusher)
    crowd = Crowd()
    for number in range(100):
        upper.flush_here(lambda failure, number=number: crowd.answers.update({number: failure}))
    assert crowd.answers == dict.fromkeys(range(100))
    assert switches(flusher) < before + 10


def test_a_thousand_at_once_cost_three_flushes_of_the_upper(stage: Stage) -> None:
    upper, _ = stage.attach()
    stage.host()
    before = stage.disk.counters().flushes
    stage.write("once")
    assert flush(upper) is None
    cost = stage.disk.counters().flushes - before  # a journal may need more than one
    stage.write("file", pages=100)
    before = stage.disk.counters().flushes
    crowd = Crowd()
    start = threading.Barrier(10)

    def ask(first: int) -> None:
        start.wait(SECONDS)
        for number in range(first, first + 100):
            upper.flush(lambda failure, number=number: crowd.answers.__setitem__(number, failure))  # type: ignore[misc]

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(0, 1000, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    crowd.wait(1000)
    assert set(crowd.answers.values()) == {None}
    assert stage.disk.counters().flushes - before <= 3 * cost
    assert upper.flushes <= 1 + 100  # of threads that take turns: a flush of a clean upper is quick


def test_who_calls_while_a_flush_is_under_way_gets_the_next(ext4: Stage) -> None:
    upper, _ = ext4.attach()
    crowd = Crowd()

    def ask(number: int) -> None:
        def done(failure: OSError | None) -> None:
            crowd.flushes[number] = upper.flushes
            crowd.threads.add(threading.get_ident())
            crowd.answers[number] = failure

        upper.flush(done)

    ext4.write("first")
    ext4.disk.hang()
    ask(0)
    deadline = time.monotonic() + SECONDS
    while upper.flushes == 0:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(0.1)
    for number in range(1, 1000):
        ask(number)
    began = time.perf_counter()
    upper.check()
    assert time.perf_counter() - began < 0.05  # it does not wait for the flush
    assert not crowd.answers
    ext4.disk.resume()
    crowd.wait(1000)
    assert crowd.flushes[0] == 1
    assert {crowd.flushes[number] for number in range(1, 1000)} == {2}
    assert crowd.threads.isdisjoint({threading.get_ident()})


def test_an_answer_that_raises_does_not_keep_the_others_waiting(ext4: Stage, caplog: pytest.LogCaptureFixture) -> None:
    upper, _ = ext4.attach()
    crowd = Crowd()
    ext4.write("file")
    ext4.disk.hang()
    upper.flush(lambda failure: 1 / 0)  # type: ignore[arg-type]
    upper.flush(lambda failure: crowd.answers.__setitem__(1, failure))
    ext4.disk.resume()
    crowd.wait(1)
    assert "ZeroDivisionError" in caplog.text


def test_a_flush_that_fails_is_answered_with_its_errno_and_is_an_error_of_the_upper(stage: Stage) -> None:
    upper, account = stage.attach()
    stage.write("file")
    stage.disk.fail("flush")
    failure = flush(upper)
    assert failure is not None
    assert (failure.errno, upper.failing) == (EIO, failure)
    assert account.owed() is not None
    assert "flush" in {error.source for error in stage.heard}


@pytest.mark.parametrize("what", ["all", "flush"])
def test_an_upper_that_has_died_fails_every_flush_even_when_the_disk_is_well_again(stage: Stage, what: str) -> None:
    """An aborted journal (ext4) or transaction (btrfs), a shutdown (xfs); ext4 without a journal recovers."""
    upper, _ = stage.attach()
    _, late = stage.attach()
    stage.write("file")
    os.mkdir(stage.root / "metadata")
    stage.disk.fail(what)
    assert [failure and failure.errno for failure in (flush(upper), flush(upper), flush(upper))] == [EIO] * 3
    recorded = len(upper.ledger.errors)
    stage.disk.heal()
    answers = [flush(upper) for _ in range(4)]
    if stage.disk.filesystem == "ext4-nojournal":
        assert answers[-1] is None
        assert upper.failing is None
        assert len(late.errors()) > recorded  # who wrote meanwhile and did not ask is told too
    else:
        assert [failure and failure.errno for failure in answers] == [EIO] * 4
        assert len(upper.ledger.errors) == recorded


@pytest.mark.parametrize("stage", ["ext4", "xfs", "btrfs"], indirect=True)
def test_an_upper_that_died_while_only_the_host_looked_fails_every_flush(stage: Stage) -> None:
    """btrfs then has no error on its superblock and answers syncfs with 0: that it is read-only is all there is."""
    upper, _ = stage.attach()
    assert flush(upper) is None
    os.mkdir(stage.root / "metadata")
    stage.disk.fail("flush")
    assert stage.host() == EIO
    stage.disk.heal()
    assert [failure and failure.errno for failure in (flush(upper), flush(upper))] == [EIO, EIO]


def test_an_upper_that_was_read_only_from_the_beginning_is_not_in_doubt(ext4: Stage) -> None:
    (ext4.root / "work").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", ext4.disk.path], check=True)
    fd = os.open(ext4.root / "work", os.O_RDONLY)
    try:
        upper = ext4.uppers.get(fd, fd)
        upper.attach("", volatile=False)
        assert "Read-only" in upper.refused
        assert flush(upper) is None
    finally:
        os.close(fd)


def test_a_full_upper_is_not_a_dead_one(stage: Stage) -> None:
    upper, _ = stage.attach()
    stage.lose("victim")
    fill(stage)
    assert flush(upper) is None
    assert flush(upper) is None
    assert upper.failing is None


def test_on_an_upper_too_full_for_probes_the_tracepoint_serves(ext4: Stage) -> None:
    (ext4.root / "work").mkdir()
    victim = ext4.write("victim")
    fill(ext4)
    fd = os.open(ext4.root / "work", os.O_RDONLY)
    try:
        upper = ext4.uppers.get(fd, fd)
        upper.attach("", volatile=False)
    finally:
        os.close(fd)
    assert upper.eyes == "trace"
    assert "No space" in upper.refused
    ext4.lose("victim")
    assert flush(upper) is None
    assert (errnos(upper), set(upper.failed(0) or ())) == ([EIO], {victim})


@contextlib.contextmanager
def no_descriptors_left() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = [os.open("/", os.O_PATH)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                used.append(os.dup(used[0]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in used:
            os.close(fd)


def test_a_flush_that_fails_is_an_error_for_all_though_there_is_no_descriptor_left(ext4: Stage) -> None:
    """That of the device's cache, which the upper has not recorded."""
    upper, account = ext4.attach()
    _, other = ext4.attach()
    assert flush(upper) is None
    ext4.disk.fail("flush")
    with no_descriptors_left():
        failure = flush(upper)
    assert failure and failure.errno == EIO
    assert errnos(upper) == [EIO]
    assert account.owed() and other.owed()


def is_told(account: Account) -> bool:
    """Whether the overlay is owed an error after a flush; it is told of it then."""
    owed = account.owed()
    if owed:
        account.propagated(owed)
    return owed is not None


@pytest.mark.parametrize("because", ["the flush failed", "there was no descriptor"])
def test_the_error_after_one_that_was_told_without_a_fresh_probe_is_another(ext4: Stage, because: str) -> None:
    """What has to be consumed for the probe, without the tracepoint, is then not the one that was told."""
    ext4.uppers = Uppers(trace=False)
    upper, account = ext4.attach()
    ext4.lose("first")
    if because == "the flush failed":
        ext4.disk.fail("flush")
        assert flush(upper)
        ext4.disk.heal()
    else:
        with no_descriptors_left():
            assert flush(upper) is None
    assert is_told(account)
    ext4.lose("second")
    flush(upper)
    assert is_told(account)
    assert upper.eyes == "probes"
    assert flush(upper) is None
    assert not is_told(account)


def test_no_room_for_a_fresh_probe_costs_it_for_no_longer_than_that(
    ext4: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ext4.uppers = Uppers(trace=False)
    upper, account = ext4.attach()
    mount = probes.mount

    def full(scratch_fd: int, *, volatile: bool) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(probes, "mount", full)
    for name in ("first", "second"):
        ext4.lose(name)
        assert flush(upper) is None
        assert is_told(account)
    monkeypatch.setattr(probes, "mount", mount)
    assert flush(upper) is None
    ext4.lose("third")
    upper.check()
    assert is_told(account)


def test_an_error_that_both_a_probe_and_the_cursor_tell_was_taken_from_the_host(
    ext4: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = probes.mount

    def only_volatile(scratch_fd: int, *, volatile: bool) -> int:
        if volatile:
            return mount(scratch_fd, volatile=True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(probes, "mount", only_volatile)
    upper, _ = ext4.attach()
    ext4.lose("victim")
    assert flush(upper) is None
    assert [(error.errno, error.taken) for error in upper.ledger.errors] == [(EIO, True)]
    assert ext4.host() == 0


def test_a_superblock_that_there_is_no_descriptor_left_to_watch_is_not_watched(ext4: Stage) -> None:
    trace = Trace()
    with no_descriptors_left():
        for watch in (lambda: trace.watch(1), lambda: trace.expect([1, 2])):
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                watch()
    fd = mounts.new_mount("tracefs", [])
    try:
        os.stat(f"instances/{trace.name}", dir_fd=fd)
        trace.close()
        with pytest.raises(FileNotFoundError):
            os.stat(f"instances/{trace.name}", dir_fd=fd)
    finally:
        os.close(fd)


def test_an_error_is_seen_by_check_while_the_disk_hangs(ext4: Stage) -> None:
    """The probe that fired is a mount, and its work directory is removed when it goes."""
    upper, _ = ext4.attach()
    ext4.lose("victim")
    fd = os.open(ext4.root, os.O_RDONLY)
    ext4.disk.hang()
    (ext4.root / "directory").mkdir()
    commit = threading.Thread(target=lambda: os.fsync(fd))
    check = threading.Thread(target=upper.check)
    try:
        commit.start()
        commit.join(0.5)
        assert commit.is_alive()
        check.start()
        check.join(2)
        assert not check.is_alive()
        assert errnos(upper) == [EIO]
    finally:
        ext4.disk.resume()
        for thread in (commit, check):
            thread.join(SECONDS)
        os.close(fd)
    assert flush(upper) is None


def test_with_the_cursor_alone_a_flush_reaches_the_disk_and_a_death_is_seen(ext4: Stage, no_probes: None) -> None:
    ext4.uppers = Uppers(trace=False)
    upper, _ = ext4.attach()
    ext4.write("file")
    assert flush(upper) is None
    assert ext4.disk.marker in ext4.disk.snapshot(durable=True)
    ext4.disk.fail("all")
    ext4.write("file")
    assert [failure and failure.errno for failure in (flush(upper), flush(upper))] == [EIO, EIO]
