"""The worker dies, or stops: no call is turned into ENOSYS, no error is lost, no notification forgotten."""

import errno
import itertools
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from overt.events import Events
from overt.guard.store import MOST_FDS, Keeper, Store
from overt.guard.supervisor import Supervisor, _is_dying, listen, status_path
from overt.host import process

from .ground import EIO, Ground, descriptors, wait_until

pytestmark = pytest.mark.root


def kill_worker(ground: Ground) -> None:
    """Kill it and wait until another answers."""
    assert ground.guard is not None
    before = ground.guard.worker
    ground.guard.kill_worker()
    wait_until(lambda: ground.guard is not None and ground.guard.worker != before, "another worker")


@pytest.mark.parametrize("times", [12, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
def test_calls_go_on_while_workers_are_killed(guarded: Ground, times: int) -> None:
    container = guarded.container("runc")
    fd = container.open()
    assert guarded.guard is not None
    container.say("calls", fd, 0.25 * times)
    for _ in range(times):
        time.sleep(0.02)
        guarded.guard.kill_worker()
        time.sleep(0.2)
    calls, *wrong = container.hear(60)
    assert wrong == [0, 0, 0, 0], said(guarded)  # EIO, ENOSYS, EINTR, others
    assert calls > times
    assert guarded.guard.status()["generation"] > times // 2


def said(ground: Ground) -> list[dict[str, object]]:
    """What might explain a wrong answer."""
    assert ground.guard is not None
    kinds = ("given up", "internal error", "upper error", "not guarded", "told or not")
    return [event for kind in kinds for event in ground.guard.events(kind)]


def test_an_error_that_comes_while_no_worker_lives_is_told(guarded: Ground) -> None:
    container, other = guarded.container(), guarded.container("runc")
    assert guarded.guard is not None
    for number in range(4):
        old = container.open()
        guarded.guard.kill_worker()
        container.lose(f"/victim-{number}")
        guarded.guard.kill_worker()
        assert [container.syncfs(old), container.syncfs(old), container.new_syncfs()] == [EIO, 0, 0]
        assert [other.new_syncfs(), other.new_syncfs()] == [EIO, 0]


def test_the_host_looking_while_no_worker_lives_hides_nothing(guarded: Ground) -> None:
    container = guarded.container()
    assert guarded.guard is not None
    with stopped_supervisor(guarded):
        guarded.guard.kill_worker()
        container.lose()
        assert guarded.host_syncfs() == EIO
    assert [container.new_syncfs(), container.new_syncfs()] == [EIO, 0]


@contextmanager
def stopped_supervisor(ground: Ground) -> Iterator[None]:
    """Nobody starts another worker."""
    assert ground.guard is not None
    os.kill(ground.guard.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(ground.guard.process.pid, signal.SIGCONT)


def test_who_was_told_and_who_is_yet_to_be_is_known_to_the_next_worker(guarded: Ground) -> None:
    one, other = guarded.container(), guarded.container()
    fds = [one.open() for _ in range(3)]
    one.lose()
    assert [one.syncfs(fds[0]), one.syncfs(fds[0])] == [EIO, 0]
    kill_worker(guarded)
    assert [one.syncfs(fds[1]), one.syncfs(fds[1])] == [EIO, 0]
    kill_worker(guarded)
    assert [one.syncfs(fd) for fd in fds] == [0, 0, EIO]
    assert [other.new_syncfs(), other.new_syncfs(), one.new_syncfs()] == [EIO, 0, 0]
    kill_worker(guarded)
    assert [other.new_syncfs(), one.new_syncfs(), *(one.syncfs(fd) for fd in fds)] == [0] * 5
    assert guarded.guard is not None
    assert guarded.guard.status()["doubtful"] == 0


def test_a_call_that_a_worker_has_taken_is_answered_by_the_next(guarded: Ground) -> None:
    container = guarded.container()
    fd = container.ask("write", "/victim", guarded.disk.marker.hex(), 1)
    guarded.disk.hang()
    try:
        container.say("syncfs", fd)
        assert guarded.guard is not None
        wait_until(lambda: taken(guarded), "the call is taken")
        kill_worker(guarded)
        assert taken(guarded)
    finally:
        guarded.disk.fail("data")
        guarded.disk.resume()
    assert container.hear() == [EIO]
    guarded.disk.heal()
    assert container.syncfs(fd) == 0


def taken(ground: Ground) -> bool:
    assert ground.guard is not None
    return any(each["waiting"] for each in ground.guard.status()["containers"])


def test_workers_killed_while_they_tell_lose_nothing(guarded: Ground) -> None:
    container = guarded.container()
    assert guarded.guard is not None
    told, owed = 0, 0
    for number in range(5):
        fds = [container.open() for _ in range(8)]
        container.lose(f"/victim-{number}")
        for at, fd in enumerate(fds):
            container.say("syncfs", fd)
            if at % 3 == 1:
                guarded.guard.kill_worker()
            code = container.hear()[0]
            assert code in (0, EIO)
            told += code == EIO
            owed += 1
            assert code == EIO, f"lost: descriptor {at} of round {number}"
    again = sum(container.syncfs(fd) == EIO for fd in fds)
    assert again <= sum(1 for _ in guarded.guard.events("told or not"))
    assert told == owed


@contextmanager
def no_room(pid: int, *, but_for: int = 0) -> Iterator[None]:
    """A process can have no more descriptors than it has, but for so many."""
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    free = (number for number in itertools.count() if not os.path.lexists(f"/proc/{pid}/fd/{number}"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (next(itertools.islice(free, but_for, None)), limits[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def test_where_there_can_be_no_worker_there_is_one_later(guarded: Ground) -> None:
    container = guarded.container()
    fd = container.open()
    guard = guarded.guard
    assert guard is not None
    with no_room(guard.process.pid):
        guard.kill_worker()
        container.say("syncfs", fd)
        wait_until(lambda: guard.events("no worker") or guard.process.poll() is not None, "there can be none")
    assert container.hear() == [0]
    assert guard.status()["generation"] == 2


def test_a_container_that_comes_when_the_worker_has_hardly_room_is_guarded(guarded: Ground) -> None:
    """By the next worker, if there is none for its listener."""
    guard = guarded.guard
    assert guard is not None
    for room, worker in ((1, 1), (0, 2)):
        said = len(guard.events("guarding"))
        with no_room(guard.worker, but_for=room):
            container = guarded.container(wait=False)
            wait_until(lambda said=said: len(guard.events("guarding")) > said, "it is guarded")
        assert container.new_syncfs() == 0
        assert guard.status()["generation"] == worker


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    """One that does not run."""
    path = tmp_path / "guard"
    with listen(path) as socket, listen(status_path(path)) as status:
        handed = {str(path): socket, str(status_path(path)): status}
        made = Supervisor(path, Events(foreground=True), handed=handed)
        yield made
        made.close()


def test_what_a_fork_that_fails_was_to_have_is_given_back(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fork)
    before = descriptors(os.getpid())
    try:
        with pytest.raises(BlockingIOError):
            supervisor._fork()
        assert descriptors(os.getpid()) == before
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert supervisor.workers == 0
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))


def test_what_a_worker_says_last_is_heard(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the look whether it says something, and before the one whether it is dead but for a disk."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here.setblocking(False)
    supervisor.store.put("overlay/7/1", "before", [])

    def is_dying(pid: int) -> bool:
        Keeper(there).set("overlay/7/1", "told")
        return True

    monkeypatch.setattr("overt.guard.supervisor._is_dying", is_dying)
    woken, wake = os.pipe()
    os.write(wake, b"\0")
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        with there:
            supervisor._serve(pid, here, woken)
        assert supervisor.store.entries["overlay/7/1"].value == "told"
        wait_until(lambda: supervisor._bury(0) or not supervisor._dying, "it is buried")
    finally:
        os.close(woken)
        os.close(wake)


def test_a_container_for_whose_descriptors_there_is_no_room_is_handed_over_later(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send_fds(*_: object) -> int:
        raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))

    ours, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, worker:
        supervisor._keep(b"{}", [os.dup(0)])
        with monkeypatch.context() as full:
            full.setattr(socket, "send_fds", send_fds)
            supervisor._hand_over(ours)
        supervisor._hand_over(ours)
        data, fds, _, _ = socket.recv_fds(worker, 64, 2)
    assert (data, len(fds)) == (b"1\n{}", 1)
    os.close(fds[0])


@pytest.mark.parametrize("said", [b'["put", "upper/7", 0]', b'["set", "upper/7", 0]', b"nothing"])
def test_what_comes_with_a_message_that_makes_no_sense_is_closed(said: bytes) -> None:
    store = Store()
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = descriptors(os.getpid())
    with pair[0], pair[1]:
        socket.send_fds(pair[1], [said], [0] * (MOST_FDS + 1 if b"put" in said else 1))
        with pytest.raises((OSError, KeyError, ValueError)):
            store.hear(pair[0])
        wait_until(lambda: descriptors(os.getpid()) == before, "it is closed", 5)
    assert store.entries == {}


def test_without_a_descriptor_to_look_with_nobody_is_taken_for_dead() -> None:
    with no_room(os.getpid()):
        assert not _is_dying(os.getpid())


def test_a_table_of_descriptors_that_cannot_be_larger_stays_as_it_is() -> None:
    with no_room(os.getpid()):
        process.make_room_for_descriptors()


def test_a_container_can_be_killed_while_the_agent_is_stopped(guarded: Ground) -> None:
    container = guarded.container()
    fd = container.open()
    assert guarded.guard is not None
    worker = guarded.guard.worker
    os.kill(worker, signal.SIGSTOP)
    try:
        container.say("syncfs", fd)
        time.sleep(0.1)
        container.kill()
        wait_until(lambda: not alive(container.pid), "the container is dead", 5)
    finally:
        os.kill(worker, signal.SIGCONT)
    other = guarded.container()
    assert other.new_syncfs() == 0


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
