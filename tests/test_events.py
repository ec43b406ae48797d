"""The event log: nobody waits for who reads it, and what was said is in it all the same."""

import json
import select
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from overt import events

pytestmark = pytest.mark.timeout(20)

FULL = """
import os, sys, threading
from overt.events import Events, leave

def refuse(thread):
    raise RuntimeError("can't start new thread")

os.set_blocking(2, False)
try:
    while os.write(2, b"." * 1024):
        pass
except BlockingIOError:
    os.set_blocking(2, True)
threads = threading.Thread.start
if "short" in sys.argv:
    threading.Thread.start = refuse
log = Events(foreground=True)
for number in range(200):
    log.say("said", number=number, much="x" * number * (16 if "fork" in sys.argv else 64))  # PIPE_BUF is in one piece
threading.Thread.start = threads
if "fork" in sys.argv and os.fork() == 0:
    log.say("said", number=-1)
    leave(0)
print("said", flush=True)
if "leave" in sys.argv:
    leave(0)
"""


@pytest.mark.parametrize("how", ["exit", "leave", "fork", "short of threads"])
def test_who_does_not_read_keeps_nobody_and_who_reads_again_misses_nothing(how: str) -> None:
    """Neither what a process says last, nor what the child of its fork does."""
    with subprocess.Popen(
        [sys.executable, "-c", FULL, *how.split()], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as saying:  # fmt: skip
        assert saying.stdout is not None and saying.stderr is not None
        try:
            assert select.select([saying.stdout], [], [], 10)[0], "it waits for who reads"
            logged = [json.loads(line) for line in saying.stderr.read().lstrip(b".").splitlines()]
        finally:
            saying.kill()
    said = [line["number"] for line in logged]
    assert [number for number in said if number >= 0] == list(range(200))
    assert said.count(-1) == (how == "fork")


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], socket.socket]:
    """Start one that keeps a log, or start it again."""
    path = tmp_path / "log"
    monkeypatch.setattr(events, "_SYSLOG", str(path))

    def start() -> socket.socket:
        path.unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listening.bind(str(path))
        listening.settimeout(5)
        return listening

    return start


def numbers(listening: socket.socket, count: int) -> list[int]:
    lines = [listening.recv(4096).decode() for _ in range(count)]
    assert all(line.startswith("<14>") and " overt: {" in line for line in lines)
    return [json.loads(line.partition(" overt: ")[2])["number"] for line in lines]


def test_a_log_daemon_that_hangs_keeps_nobody_and_one_that_is_started_again_is_found(
    daemon: Callable[[], socket.socket],
) -> None:
    log = events.Events(foreground=False)
    for first in (0, 1000):
        with daemon() as listening:
            for number in range(100):  # more than net.unix.max_dgram_qlen
                log.say("said", number=first + number)
            assert numbers(listening, 100) == list(range(first, first + 100))
    assert log.counts == {"said": 200}


def test_what_is_too_much_is_counted(daemon: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_KEPT", 5)
    with daemon() as listening:
        room = 0
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, suppress(BlockingIOError):
            other.connect(events._SYSLOG)
            while other.send(b"other", socket.MSG_DONTWAIT):
                room += 1
        log = events.Events(foreground=False)
        for number in range(12):
            log.say("said", number=number)
        for _ in range(room):
            assert listening.recv(64) == b"other"
        assert numbers(listening, 6) == [0, 1, 2, 3, 4, 7]
