"""Overlays with a FUSE layer whose server has stopped: closing a duplicate of a file there keeps nobody."""

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest

from overt.events import Events
from overt.guard import resume
from overt.guard.agent import Agent
from overt.guard.closing import Closer
from overt.guard.descriptions import Loans
from overt.guard.room import Room
from overt.guard.slots import Slots
from overt.guard.store import Entry, Store
from overt.host import mounts
from overt.lab import Disk
from overt.upper import probes

from .ground import EIO, Ground, wait_until
from .member import member, new_syncfs, syncfs

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

KEPT: list[int] = []


class Layer:
    """A directory that fuse-overlayfs serves, with one file in it."""

    def __init__(self, below: Path) -> None:
        self.path = below / "served"
        parts = {name: below / name for name in ("source", "fuse-upper", "fuse-work", "served")}
        for part in parts.values():
            part.mkdir(parents=True)
        (parts["source"] / "file").write_text("lower")
        options = f"lowerdir={parts['source']},upperdir={parts['fuse-upper']},workdir={parts['fuse-work']}"
        before = os.stat(self.path).st_dev
        self._server = subprocess.Popen(["fuse-overlayfs", "-f", "-o", options, str(self.path)])
        wait_until(lambda: os.stat(self.path).st_dev != before, "it is mounted")

    def stop(self) -> None:
        """Have it answer nothing."""
        self._server.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """Whoever waits for it has an error then: its connection is gone."""
        self._server.kill()
        self._server.wait(20)

    def end(self) -> None:
        self.kill()
        mounts.umount(str(self.path), mounts.MNT_DETACH)


@pytest.fixture
def layer(tmp_path: Path) -> Iterator[Layer]:
    if shutil.which("fuse-overlayfs") is None:
        pytest.skip("not installed: fuse-overlayfs")
    made = Layer(tmp_path / "layer")
    try:
        yield made
    finally:
        made.end()


def mount_on(layer: Path, below: Path) -> None:
    """An overlay on BELOW/merged, whose lower directory is `layer`."""
    for part in ("upper", "work", "merged"):
        (below / part).mkdir(parents=True, exist_ok=True)
    options = [("lowerdir", str(layer)), ("upperdir", str(below / "upper")), ("workdir", str(below / "work"))]
    fd = mounts.new_mount("overlay", options)
    try:
        mounts.attach(fd, str(below / "merged"))
    finally:
        os.close(fd)


def returns(act: Callable[[], object], seconds: float = 5.0) -> bool:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


@pytest.fixture(scope="module")
def disk() -> Iterator[Disk]:
    with Disk("ext4", size=64 << 20) as made:
        yield made


@pytest.fixture
def stuck(layer: Layer, tmp_path: Path) -> Iterator[int]:
    """A descriptor on an overlay over a layer that does not answer."""
    mount_on(layer.path, tmp_path / "overlay")
    fd = os.open(tmp_path / "overlay" / "merged" / "file", os.O_RDONLY)
    layer.stop()
    try:
        yield fd
    finally:
        layer.kill()
        with suppress(OSError):  # of the server that is no more
            os.close(fd)
        mounts.umount(str(tmp_path / "overlay" / "merged"), mounts.MNT_DETACH)


def test_what_the_supervisor_forgets_is_closed_on_another_thread(stuck: int) -> None:
    store = Store()
    for number in range(2):
        store.put(f"owed/7/1/2/{number}", 0, [os.dup(stuck)])
    assert returns(lambda: store.drop("owed/7/1/2/0"))
    assert returns(lambda: store.put("owed/7/1/2/1", 1, []))
    assert list(store.entries) == ["owed/7/1/2/1"]


@pytest.fixture
def probe(disk: Disk) -> int:
    """An ordinary probe's descriptor, the test's to close: to unmount it flushes the disk, which has to write."""
    scratch = os.open(disk.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        made = probes.mount(scratch, volatile=False)
    finally:
        os.close(scratch)
    Path(disk.path, "dirty").write_bytes(b"dirty" * 4096)
    return made


def is_open(*fds: int) -> bool:
    """Whether any of them is."""
    return any(os.path.lexists(f"/proc/self/fd/{fd}") for fd in fds)


def test_a_probe_that_the_supervisor_holds_last_is_unmounted_on_another_thread(disk: Disk, probe: int) -> None:
    """The worker lets go of it, and then has its upper kept without."""
    store = Store()
    store.put("upper/7", 0, [probe])
    disk.hang()
    try:
        assert returns(lambda: store.put("upper/7", 1, []))
    finally:
        disk.resume()
    wait_until(lambda: not is_open(probe), "it is closed")


@pytest.mark.parametrize("begun", [False, True])
def test_the_next_worker_keeps_nothing_that_is_yet_to_be_closed(
    disk: Disk, probe: int, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """Nor closes what else may have got the number of what is being closed: nothing has."""
    put_off, real = threading.Event(), os.dup2

    def dup2(fd: int, fd2: int, inheritable: bool = True) -> int:
        assert inheritable or put_off.wait(30)  # pytest's own are
        return real(fd, fd2, inheritable)

    kept, directory = (os.open(disk.path, os.O_RDONLY) for _ in range(2))
    store = Store()
    store.put("upper/7", 0, [kept])
    store.put("upper/8", 0, [probe, directory])
    monkeypatch.setattr(os, "dup2", real if begun else dup2)
    disk.hang()
    try:
        store.drop("upper/8")
        if begun:
            wait_until(lambda: "eventfd" in os.readlink(f"/proc/self/fd/{probe}"), "its number is still taken")
        pid = os.fork()
        if pid == 0:
            monkeypatch.undo()
            try:
                store.inherit()
                wait_until(lambda: not is_open(probe, directory), "they are closed here as well", 5)
                os._exit(0 if is_open(kept) else 2)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        put_off.set()
        disk.resume()
        store.drop("upper/7")
    wait_until(lambda: not is_open(probe, directory, kept), "they are closed")


def test_an_upper_that_no_overlay_has_any_more_is_let_go_by_the_next_worker(disk: Disk, probe: int) -> None:
    """The worker died after it had said so of the overlay, and before it had said so of the upper."""
    state = {"fds": [False, True, False], "accepted": True, "known": False, "born_read_only": False, "errors": []}
    with ExitStack() as stack:
        here, there, status = (stack.enter_context(end) for end in (*socket.socketpair(), socket.socket()))
        agent = Agent(there, status, Slots(4), None, None, Events(foreground=True), 2, "all")
        disk.hang()
        try:
            assert returns(lambda: resume.restore(agent, {"upper/7": Entry(state, (probe,))}))
        finally:
            disk.resume()
        assert json.loads(here.recv(99, socket.MSG_DONTWAIT)) == ["drop", "upper/7", None]
    wait_until(lambda: not is_open(probe), "it is closed")


def test_a_duplicate_takes_room_until_it_is_closed_and_keeps_no_other_party(stuck: int) -> None:
    loans = Loans(Room(32))  # two for each party
    me, other = os.getpid(), os.open("/", os.O_RDONLY)
    try:
        held = [loans.borrow("one", me, stuck, lambda place: True) for _ in range(3)]
        assert held[2] == -1 and min(held[:2]) >= 0
        assert returns(lambda: [loans.give_back("one", fd) for fd in held[:2]])
        assert loans.borrow("one", me, stuck, lambda place: True) == -1
        ours = loans.borrow("two", me, other, lambda place: True)
        loans.give_back("two", ours)
        wait_until(lambda: not os.path.exists(f"/proc/self/fd/{ours}"), "the other party's is closed")
    finally:
        os.close(other)


def test_a_few_threads_close_for_any_number_of_parties(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error a thousand containers have a descriptor each to be closed, and all at once."""
    started = []

    class Counted(threading.Thread):
        def start(self) -> None:
            started.append(self)
            super().start()

    monkeypatch.setattr(threading, "Thread", Counted)
    closer = Closer()
    closed: list[int] = []
    for party in range(500):
        fd = os.dup(0)
        closer.close(str(party), fd, partial(closed.append, party))
    wait_until(lambda: len(closed) == 500, "all are closed")
    assert len(started) < 10


@pytest.mark.parametrize("problem", [RuntimeError, MemoryError])
def test_what_finds_no_thread_is_closed_with_what_comes_next(
    monkeypatch: pytest.MonkeyPatch, problem: type[Exception]
) -> None:
    closer = Closer()
    one, other = os.dup(0), os.dup(0)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", Mock(side_effect=problem))
        closer.close("one", one)
    closer.close("other", other)
    wait_until(lambda: not is_open(one, other), "both are closed", 5)


def test_whoever_comes_after_all_threads_were_kept_is_closed_too(stuck: int) -> None:
    """One thread for each party that is kept, and one more."""
    closer = Closer()
    for party in range(5):
        closer.close(str(party), os.dup(stuck))
    time.sleep(2)  # whoever has nothing to do goes
    closed: list[int] = []
    begun = time.monotonic()
    for party in range(500):
        closer.close(f"other {party}", os.dup(0), partial(closed.append, party))
    wait_until(lambda: len(closed) == 500, "the others' are closed")
    assert time.monotonic() - begun < 3


def keep_open(path: Path) -> None:
    KEPT.append(os.open(path, os.O_RDONLY))


def ask() -> int:
    return syncfs(KEPT[-1])


def test_a_layer_that_never_answers_keeps_only_its_own_container(guarded: Ground, layer: Layer) -> None:
    volume = Path(guarded.disk.path, "volume")
    container = guarded.container()
    old = container.open()
    with member(guarded) as one:
        try:
            one.do(mount_on, layer.path, volume)
            assert one.do(new_syncfs, volume / "merged") == 0
            one.do(
                keep_open, volume / "merged" / "file"
            )  # and none is closed before, or it is known that it need not be
            layer.stop()
            for _ in range(2):
                container.lose()
                assert container.syncfs(old) == EIO  # the other's is held now
                assert one.do(ask) == EIO  # it is let go of, by both processes
                assert container.syncfs(old) == 0
            late = guarded.container()
            assert late.new_syncfs() == 0
            assert guarded.guard is not None
            assert (guarded.guard.status()["crashes"], guarded.guard.events("worker ended")) == (0, [])
        finally:
            layer.kill()
