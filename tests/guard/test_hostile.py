"""Containers and callers that mean no good, or are in a hurry: at most an error for themselves."""

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from overt.lab import Disk

from .ground import EINTR, EIO, Ground, descriptors, wait_until

pytestmark = pytest.mark.root


def test_who_calls_while_the_disk_is_busy_shares_a_flush_and_one_thread_is_told(guarded: Ground) -> None:
    container = guarded.container()
    fd = container.ask("write", "/victim", guarded.disk.marker.hex(), 1)
    assert guarded.guard is not None
    status = guarded.guard.status
    before = status()["uppers"][0]["flushes"]
    guarded.disk.hang()
    try:
        container.say("threads", fd, 400)
        wait_until(lambda: status()["containers"][0]["waiting"] == 400, "all wait")
    finally:
        guarded.disk.fail("data")
        guarded.disk.resume()
    assert container.hear() == [1, 0]
    guarded.disk.heal()
    assert status()["uppers"][0]["flushes"] - before <= 3


def test_many_containers_that_call_at_once_are_all_told(guarded: Ground) -> None:
    containers = [guarded.container() for _ in range(4)]
    fds = [each.open() for each in containers]
    containers[0].lose()
    for each, fd in zip(containers, fds, strict=True):
        each.say("threads", fd, 20)
    assert [each.hear() for each in containers] == [[1, 0]] * 4


def test_a_descriptor_that_is_swapped_all_the_time_takes_nothing_from_others(guarded: Ground) -> None:
    swapping, other = guarded.container(), guarded.container()
    fd = swapping.open()
    old = other.open()
    assert swapping.ask("swap", fd, "/", "/proc") == 0
    swapping.say("calls", fd, 1.0)
    other.lose()
    assert [other.syncfs(old), other.syncfs(old)] == [EIO, 0]
    made = 0
    for _ in range(20):  # more than once where the machine is busy
        calls, _, enosys, _, strange = swapping.hear()
        assert (enosys, strange) == (0, 0)
        made += calls
        if made > 50:
            break
        swapping.say("calls", fd, 1.0)
    assert made > 50
    assert guarded.guard is not None
    assert guarded.guard.status()["crashes"] == 0


def test_a_disk_that_hangs_keeps_only_its_own_containers_and_killing_one_leaks_nothing(guarded: Ground) -> None:
    with Disk("ext4", size=64 << 20) as second:
        stuck, killed, well = guarded.container(), guarded.container(), guarded.container(disk=second)
        fds = [each.ask("write", "/data", "00", 1) for each in (stuck, killed)]
        guarded.disk.hang()
        try:
            stuck.say("syncfs", fds[0])
            killed.say("syncfs", fds[1])
            assert guarded.guard is not None
            status = guarded.guard.status
            wait_until(lambda: sum(each["waiting"] for each in status()["containers"]) == 2, "both calls wait")
            assert [well.new_syncfs() for _ in range(3)] == [0, 0, 0]
            killed.kill()
            well.lose()
            assert [well.new_syncfs(), well.new_syncfs()] == [EIO, 0]
        finally:
            guarded.disk.resume()
        assert stuck.hear() == [0]
        wait_until(lambda: len(status()["containers"]) == 2, "the killed container is let go")
        wait_until(lambda: [each["waiting"] for each in status()["containers"]] == [0, 0], "both calls are done")
        guarded.end(well)
        wait_until(lambda: len(status()["uppers"]) == 1, "the second disk is let go")


@pytest.mark.parametrize("how", ["restart", "interrupt"])
def test_signals_during_calls_lose_nothing(guarded: Ground, how: str) -> None:
    """Every 20 ms; a call that is interrupted fails with EINTR or starts again, and was not told."""
    container = guarded.container()
    fd = container.open()
    assert container.ask("signals", 20_000, how) == 0
    container.say("calls", fd, 1.0)
    calls, eio, enosys, eintr, strange = container.hear()
    assert calls > 100 and (eio, enosys, strange) == (0, 0, 0)
    assert how == "interrupt" or eintr == 0
    for number in range(20):
        container.lose(f"/victim-{number}")
        answers = [container.syncfs(fd) for _ in range(20)]
        if answers.count(EINTR) > 10:  # the machine is so busy that a call takes longer than that
            assert container.ask("signals", 0, how) == 0
            answers += [container.syncfs(fd), container.syncfs(fd)]
            assert container.ask("signals", 20_000, how) == 0
        assert (answers.count(EIO), set(answers) <= {0, EIO, EINTR}) == (1, True), answers


def test_a_call_that_waits_for_the_disk_is_interrupted_and_not_told(guarded: Ground) -> None:
    container = guarded.container()
    fd = container.ask("write", "/victim", guarded.disk.marker.hex(), 1)
    assert container.ask("signals", 20_000, "interrupt") == 0
    guarded.disk.hang()
    try:
        container.say("syncfs", fd)
        assert container.hear() == [EINTR]
    finally:
        guarded.disk.fail("data")
        guarded.disk.resume()
    assert container.ask("signals", 0, "interrupt") == 0
    assert [container.syncfs(fd), container.syncfs(fd)] == [EIO, 0]
    guarded.disk.heal()


def test_only_root_reaches_the_socket(guarded: Ground) -> None:
    assert guarded.guard is not None
    for path in (guarded.guard.socket, Path(f"{guarded.guard.socket}.status")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (b"\xff\x00not json", None),
        (b'{"fds": ["seccompFd"], "pid": 1, "state": {"id": "forged"}}', "file"),
        (b'{"fds": ["seccompFd"], "pid": 1, "state": {"id": "forged"}}', None),
        (b'{"fds": ["other", "seccompFd"], "pid": -7, "state": {"id": []}}', "file"),
        (b"[" * 50_000, "file"),
        (b'{"fds": 1}', "pipe"),
    ],
    ids=["bytes", "no listener", "no descriptor", "too few descriptors", "deep", "pipe"],
)
def test_a_forged_process_state_is_refused_and_nothing_is_kept(guarded: Ground, said: bytes, kind: str | None) -> None:
    assert guarded.guard is not None
    guard = guarded.guard
    assert guard.worker  # it has started
    pair = os.pipe()
    before = descriptors(guard.process.pid)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as looking:  # whether somebody listens; no word of it
        looking.connect(str(guard.socket))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.connect(str(guard.socket))
        fds = [] if kind is None else [pair[0]] if kind == "pipe" else [os.open("/etc/passwd", os.O_RDONLY)]
        socket.send_fds(caller, [said], fds)
        caller.shutdown(socket.SHUT_WR)
        wait_until(lambda: guard.events("refused") or guard.events("container refused"), "the guard says so")
    assert not [each for each in guard.events("refused") if each["why"].startswith("0 bytes and 0")]
    for fd in {*fds, *pair}:
        os.close(fd)
    container = guarded.container()
    assert container.new_syncfs() == 0
    guarded.end(container)
    wait_until(lambda: descriptors(guard.process.pid) <= before, "nothing is kept")
    assert guard.status()["crashes"] == 0


def test_who_connects_and_says_nothing_keeps_nobody(guarded: Ground) -> None:
    assert guarded.guard is not None
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(20)]
    try:
        for each in silent:
            each.connect(str(guarded.guard.socket))
        assert guarded.container().new_syncfs() == 0
    finally:
        for each in silent:
            each.close()


def test_a_container_that_churns_descriptors_meanwhile_is_told_all_the_same(guarded: Ground) -> None:
    container, other = guarded.container(), guarded.container()
    old = container.open()
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            other.ask("close", other.open())

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        container.lose()
        assert [container.syncfs(old), container.syncfs(old)] == [EIO, 0]
    finally:
        stop.set()
        thread.join()
    assert [other.new_syncfs(), other.new_syncfs()] == [EIO, 0]
