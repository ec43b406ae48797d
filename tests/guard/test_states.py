"""What a runtime says of a container, however large or odd: its listener is kept, for without it there is no syncfs."""

import os
import select
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from overt.events import Events
from overt.guard.agent import Agent
from overt.guard.container import Container, State
from overt.guard.slots import Slots
from overt.host import seccomp

from .ground import EIO, Ground, fail, wait_until
from .member import member, new_syncfs, overlay, write

pytestmark = pytest.mark.root


def with_annotations(size: int) -> dict[str, Any]:
    image = {"io.kubernetes.cri.image-name": "debian:12"}
    return {"state": {"id": "large", "bundle": "/nonexistent", "annotations": {"other": "y" * size, **image}}}


def test_a_container_with_long_annotations_is_guarded(guarded: Ground) -> None:
    volume = Path(guarded.disk.path, "volume")
    with member(guarded, **with_annotations(300_000)) as one:
        one.do(overlay, volume)
        assert one.do(new_syncfs, volume / "merged") == 0
        guarded.disk.fail("data")
        one.do(write, volume / "merged" / "victim", guarded.disk.marker)
        fail(guarded.disk)
        assert [one.do(new_syncfs, volume / "merged") for _ in range(2)] == [EIO, 0]
        assert guarded.guard is not None
        lost = guarded.guard.events
        wait_until(lambda: lost("file lost"), "its file is named")
        assert lost("file lost")[0]["image"] == "debian:12"


@pytest.mark.parametrize("said", [with_annotations(2_000_000), {"pid": float("inf")}], ids=["2 MB", "pid"])
def test_a_container_of_which_too_much_or_nothing_is_said_gets_errors(guarded: Ground, said: dict[str, Any]) -> None:
    """And not ENOSYS; nor does it end the workers."""
    guard = guarded.guard
    assert guard is not None
    container = guarded.container()
    worker = guard.worker
    volume = Path(guarded.disk.path, "volume")
    with member(guarded, **said) as one:
        one.do(overlay, volume)
        assert [one.do(new_syncfs, volume / "merged") for _ in range(2)] == [EIO, EIO]
        assert container.new_syncfs() == 0
        assert len(guard.events("state not read")) == 1
        assert (guard.status()["crashes"], guard.worker) == (0, worker)
        guard.kill_worker()
        assert one.do(new_syncfs, volume / "merged") == EIO
        assert container.new_syncfs() == 0
        assert guard.status()["generation"] == 2


def test_a_listener_that_ends_while_a_call_is_done_is_let_go_once() -> None:
    """`done` on another thread must not look for a listener that the loop does not watch any more."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    slots = Slots(4)
    agent = Agent(pairs[0][0], pairs[1][0], slots, None, None, Events(foreground=True), 1, "all")
    given, taken = os.pipe()
    guarded = agent.containers[3] = Container(3, State("c", 0, "", "", 0), given)
    agent.loop.watch(given, lambda what: None)
    slot = slots.take(3)
    guarded.waiting = 1
    guarded.paused = True
    agent.loop.pause(given)
    forget, failed = agent.loop.forget, list[BaseException]()

    def done() -> None:
        try:
            agent.done(guarded, slot)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=done)

    def forget_while_done(fd: int) -> None:
        forget(fd)
        thread.start()
        thread.join(0.5)

    agent.loop.forget = forget_while_done  # type: ignore[method-assign]
    try:
        agent._gone(guarded)
        thread.join(10)
        assert (failed, thread.is_alive()) == ([], False)
        assert (guarded.fd, guarded.waiting) == (-1, 0)
        assert [slots.take(1) for _ in range(5)] == [0, 1, 2, 3, -1]
    finally:
        os.close(taken)
        for pair in pairs:
            for end in pair:
                end.close()


def bring(at: Path, say: str) -> int:
    """Bring a listener as no runtime should, keep the connection, and call: what syncfs returns."""
    runtime = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    runtime.connect(str(at))
    listener = seccomp.notify("syncfs")
    whole = b'{"fds": ["seccompFd"], "pid": 1, "state": {"id": "odd", "bundle": "/"}}'
    if say == "half":
        socket.send_fds(runtime, [whole[:30]], [listener])
    else:
        socket.send_fds(runtime, [whole], [*[0] * 20, listener])
    os.close(listener)
    try:
        return new_syncfs(Path("/"))
    finally:
        runtime.close()


@pytest.mark.parametrize("say", ["half", "many descriptors"])
def test_a_runtime_that_says_no_end_or_too_much_has_its_container_get_errors(guarded: Ground, say: str) -> None:
    """And not ENOSYS. After ten seconds a connection that is kept open has had its time."""
    container = guarded.container()
    guard = guarded.guard
    assert guard is not None
    with guarded.nothing_kept():
        given, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(tell, b"%d\n" % bring(guard.socket, say))
            finally:
                os._exit(0)
        os.close(tell)
        try:
            assert select.select([given], [], [], 30)[0], "no answer"
            assert os.read(given, 16) == b"%d\n" % EIO
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(given)
        assert container.new_syncfs() == 0
        assert len(guard.events("state not read")) == 1
