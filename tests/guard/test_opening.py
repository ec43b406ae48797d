"""What is given back when an overlay cannot be opened for want of something."""

import os
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from overt.guard import anchor, opening
from overt.guard.agent import Agent
from overt.guard.container import Container
from overt.guard.overlay import Overlay
from overt.guard.slots import Notification
from overt.guard.table import Mounted
from overt.host import files

pytestmark = pytest.mark.timeout(60)

MOUNTED = Mounted(5, b"/", b"/upper", b"/work", volatile=False, id=7)
CALL = cast(Notification, SimpleNamespace(tid=1, argument=3, id=1))


class Scene:
    """As much of an agent as opening one overlay needs, on a machine that has no thread to spare."""

    def __init__(self) -> None:
        self.guarded = cast(Container, SimpleNamespace(number=1, opening=0, closed=False, devices=set(), state=None))
        self.overlay = Overlay(MOUNTED, cast(Any, None), "party")
        self.refused: list[tuple[int, str]] = []
        self.started = 0
        self.exhausted = True
        self.late: tuple[Container, int, Notification, Mounted] | None = None
        self.agent = cast(Agent, SimpleNamespace(
            lock=threading.Lock(), overlays={5: self.overlay}, apart=self.apart, not_guarded=self.not_guarded,
            shared=SimpleNamespace(room=SimpleNamespace(overlays=10)),
        ))  # fmt: skip

    def apart(self, *args: object) -> None:
        if self.exhausted:
            if self.late is not None:
                self.overlay.callers.append(self.late)
            raise RuntimeError("can't start new thread")
        self.started += 1

    def not_guarded(self, guarded: Container, slot: int, call: Notification, name: str, why: str) -> None:
        self.refused.append((slot, why))

    def call(self, slot: int) -> None:
        opening.open_first(self.agent, self.guarded, slot, CALL, MOUNTED)


@pytest.fixture
def abandoned(monkeypatch: pytest.MonkeyPatch) -> list[Overlay]:
    """The overlays that were let go of."""
    found: list[Overlay] = []
    monkeypatch.setattr(opening, "abandon", lambda agent, each: found.append(each))
    return found


def test_a_call_for_which_there_is_no_thread_keeps_none_of_the_later_ones(abandoned: list[Overlay]) -> None:
    scene = Scene()
    with pytest.raises(OSError, match="thread"):
        scene.call(0)
    assert (scene.overlay.callers, scene.guarded.opening) == ([], 0)
    assert abandoned == [scene.overlay]
    scene.exhausted = False
    scene.call(1)
    assert (scene.started, scene.guarded.opening, len(scene.overlay.callers)) == (1, 1, 1)


@pytest.mark.usefixtures("abandoned")
def test_who_called_in_between_is_answered_too() -> None:
    scene = Scene()
    scene.late = (scene.guarded, 9, CALL, MOUNTED)
    with pytest.raises(OSError, match="thread"):
        scene.call(0)
    assert [slot for slot, _ in scene.refused] == [9] and scene.overlay.callers == []


def test_mounts_of_one_overlay_are_not_remembered_without_end() -> None:
    scene = Scene()
    scene.exhausted = False
    for number in range(20_000):
        scene.overlay.mounts.add(number)
        if number % 100 == 0:
            scene.call(number)
    assert len(scene.overlay.mounts) < 10_000


def test_a_hold_that_cannot_be_proven_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: bytes) -> files.Whereabouts:
        raise PermissionError(13, "not for you")

    fd = os.open("/", os.O_RDONLY)
    try:
        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(files, "whereabouts", refuse)
        with pytest.raises(PermissionError):
            anchor.of_descriptor(os.getpid(), fd, MOUNTED)
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        os.close(fd)
