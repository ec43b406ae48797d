"""The loop changes hands at moments that no disk can be made to hit: the steps one by one, by hand."""

import os
import select
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from overt.events import Events
from overt.server.engine import Engine, _Turn
from overt.tree.known import Known


class Served:
    """As much of a mount as the engine asks for when no request is served."""

    target = "/mnt"
    due = None
    gone = False

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.tree = Known()
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Stage:
    """An engine that nobody leads, and a mount to be served, which has a request to read."""

    def __init__(self) -> None:
        self.engine = Engine(Events(foreground=True), 100)
        self._request, self._end = os.pipe()
        os.write(self._end, b"x")
        self.mount: Any = Served(self._request)
        self.engine.add(self.mount)
        self.said: list[str] = []

    def turn(self) -> _Turn:
        """A thread leads, and has taken the mount up."""
        turn = self.engine._turn = _Turn()
        turn.serving = self.mount
        return turn

    def call(self, word: str) -> None:
        """Have something done with the mount's tree, as a worker does."""
        self.engine.post(lambda: self.said.append(word), self.mount)

    def has_ready(self) -> bool:
        """Whether a leader would take the mount up now."""
        return (self._request, select.EPOLLIN) in self.engine._epoll.poll(0)

    def close(self) -> None:
        for fd in (self._request, self._end):
            os.close(fd)


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    made.close()


def test_a_leader_replaced_over_a_mount_that_another_one_keeps_takes_nothing_from_him(stage: Stage) -> None:
    """The second has taken the mount up for a call that was posted, and is replaced before it sees that it is kept."""
    engine, mount = stage.engine, stage.mount
    first = stage.turn()
    engine._replace(first)
    assert not stage.has_ready()
    second = stage.turn()
    engine._replace(second)
    assert engine.kept(0) == [(mount, first.leader)]
    engine._let_go(second, mount)
    assert engine.kept(0) == [(mount, first.leader)]
    assert not stage.has_ready()
    engine._let_go(first, mount)
    assert engine.kept(0) == []
    assert stage.has_ready()


def test_what_is_posted_for_a_mount_that_is_kept_is_done_when_it_is_let_go_and_once(stage: Stage) -> None:
    engine = stage.engine
    first = stage.turn()
    engine._replace(first)
    second = engine._turn = _Turn()
    stage.call("one")
    engine._make_calls(second)
    assert stage.said == []
    third = stage.turn()
    engine._replace(third)
    third.ended = False  # it has not seen it yet, and goes on
    stage.call("two")
    engine._make_calls(third)
    assert stage.said == []
    engine._let_go(first, stage.mount)
    fourth = engine._turn = _Turn()
    engine._make_calls(fourth)
    assert sorted(stage.said) == ["one", "two"]


def test_a_leader_replaced_while_it_does_what_was_posted_keeps_the_mount_until_that_is_done(stage: Stage) -> None:
    engine, mount = stage.engine, stage.mount
    turn = engine._turn = _Turn()

    def long() -> None:
        engine._replace(turn)
        assert engine.kept(0) == [(mount, turn.leader)]
        assert not stage.has_ready()

    engine.post(long, mount)
    stage.call("next")
    engine._make_calls(turn)
    assert engine.kept(0) == []
    assert stage.has_ready()
    assert stage.said == []  # for whoever leads now
    engine._make_calls(_Turn())
    assert stage.said == ["next"]


def test_what_posts_itself_again_leaves_others_their_turn(stage: Stage) -> None:
    engine, mount = stage.engine, stage.mount

    def wait() -> None:
        stage.said.append("not yet")
        if len(stage.said) < 1000:
            engine.post(wait, mount)

    engine.post(wait, mount)
    stage.call("another's")
    os.eventfd_read(engine._wake)
    engine._make_calls(stage.turn())
    assert stage.said == ["not yet", "another's"]
    assert stage.has_ready()
    assert (engine._wake, select.EPOLLIN) in engine._epoll.poll(0)
    engine._make_calls(stage.turn())
    assert stage.said == ["not yet", "another's", "not yet"]


def test_a_mount_that_is_gone_is_kept_by_nobody(stage: Stage) -> None:
    engine, mount = stage.engine, stage.mount
    engine.gone = lambda mount: stage.said.append("gone")
    engine._lose(stage.turn(), mount)
    engine._replace(stage.turn())
    assert engine.kept(0) == []
    engine.add(mount)  # another one with its number
    assert stage.has_ready()


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.usefixtures("no_threads")
def test_without_a_thread_to_spare_a_mount_that_is_gone_is_closed_all_the_same(stage: Stage) -> None:
    gone = []
    stage.engine.gone = gone.append
    stage.engine._lose(stage.turn(), stage.mount)
    assert gone == [stage.mount]
    assert stage.mount.closed
    assert stage.engine.mounts == {}


@pytest.mark.usefixtures("no_threads")
def test_without_a_thread_to_spare_memory_is_given_back_another_time(stage: Stage) -> None:
    mount = stage.mount
    mount.tree.forgotten = 3
    stage.engine._give_back(mount)
    assert mount.tree.forgotten == 0
