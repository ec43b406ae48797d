"""Opening an overlay for all who call meanwhile: what is one caller's alone, and whose an overlay is."""

import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from overt.guard import listener, opening
from overt.guard.agent import Agent
from overt.guard.container import Container, State
from overt.guard.overlay import Overlay, Resources
from overt.guard.slots import Notification
from overt.guard.status import describe
from overt.guard.table import Mounted, Table
from overt.host import mounts

from .member import overlay

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

NOBODY = 99_999_999
AWAY = "no such upper"


class Stand:
    """An agent as far as opening is concerned, with callers on one mount."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.overlays: dict[int, Overlay] = {}
        self.containers: dict[int, Container] = {}
        keeper: Any = SimpleNamespace(put=lambda *_: None, drop=lambda _: None)
        unused: Any = None
        self.shared = Resources(keeper, unused, unused, None)
        self.answers: dict[int, str] = {}

    def container(self, number: int) -> Container:
        made = self.containers[number] = Container(number, State(f"c{number}", os.getpid(), "", "", 0), -1)
        return made

    def apart(self, act: Any, *args: Any) -> None:
        act(*args)

    def flush(self, each: Overlay, guarded: Container, slot: int, call: Notification) -> None:
        self.answers[slot] = "flushed"

    def not_guarded(self, guarded: Container, slot: int, call: Notification, name: str, why: str) -> None:
        self.answers[slot] = why

    def begin_again(self, guarded: Container, slot: int, call: Notification) -> None:
        self.answers[slot] = "again"


class Opened(Overlay):
    """One whose upper is not found if certain callers are asked for it."""

    away_for: frozenset[int] = frozenset()

    def open(self, anchor: Any, pids: list[int], uuid: bytes = b"") -> None:
        self.marked = True
        self.opened = [*getattr(self, "opened", []), pids[0]]
        if pids[0] in self.away_for:
            raise FileNotFoundError(errno.ENOENT, AWAY)


@pytest.fixture
def fd(tmp_path: Path) -> Any:
    overlay(tmp_path)
    made = os.open(tmp_path / "merged", os.O_RDONLY)
    try:
        yield made
    finally:
        os.close(made)
        mounts.umount(str(tmp_path / "merged"), mounts.MNT_DETACH)


def answers(fd: int, tids: list[int]) -> tuple[dict[int, str], Any]:
    mounted = Table().mount_of(b"/proc/self/fd/%d" % fd, (os.getpid(),))
    assert isinstance(mounted, Mounted)
    stand: Any = Stand()
    guarded = stand.container(1)
    each: Any = Opened(mounted, stand.shared, "c1")
    each.callers = [(guarded, slot, Notification(slot, tid, 0, 0, fd), mounted) for slot, tid in enumerate(tids)]
    guarded.opening = 1
    opening._open_for_all(stand, each, guarded)
    assert guarded.opening == 0
    return stand.answers, each


def test_a_caller_that_has_died_gives_the_others_no_error(fd: int) -> None:
    got, _ = answers(fd, [NOBODY, os.getpid(), os.getpid()])
    assert list(got.values())[1:] == ["flushed"] * 2


def test_what_failed_for_one_that_died_meanwhile_is_tried_by_the_next(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "is_valid", lambda listening, number: number != 0)
    child = os.fork()
    if child == 0:
        threading.Event().wait(60)
        os._exit(0)
    try:
        monkeypatch.setattr(Opened, "away_for", {child})
        got, each = answers(fd, [child, os.getpid()])
        assert (each.opened, got) == ([child, os.getpid()], {0: "flushed", 1: "flushed"})
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_an_upper_that_is_not_found_is_looked_for_once(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "is_valid", lambda listening, number: True)
    monkeypatch.setattr(Opened, "away_for", {os.getpid()})
    got, each = answers(fd, [os.getpid()] * 3)
    assert (len(each.opened), [AWAY in why for why in got.values()]) == (1, [True] * 3)


def test_an_overlay_that_was_never_marked_is_nobodys_when_its_number_is_anothers() -> None:
    stand: Any = Stand()
    one, other = stand.container(1), stand.container(2)
    mounted = Mounted(99, b"/m", b"/u", b"/w", False, 5)
    each = opening.use(stand, one, mounted)
    each.callers = [(one, 0, Notification(0, NOBODY, 0, 0, 3), mounted)]
    opening._open_for_all(stand, each, one)
    assert (stand.overlays, one.devices) == ({}, set())
    later = opening.use(stand, other, mounted._replace(id=6))
    assert (later.party, later.users) == ("c2", {2})
    anchor: Any = SimpleNamespace(mounted=mounted)
    with pytest.raises(opening.Ended):
        each.open(anchor, [1])


class Vanishing:
    """An overlay whose account is taken away after one look at it."""

    name, users, device, incomplete = "ov", frozenset[int](), 7, True
    upper: Any = None

    def __init__(self) -> None:
        self.held: Any = SimpleNamespace(entries=[])
        self.looks = 0

    @property
    def account(self) -> Any:
        self.looks += 1
        owed = SimpleNamespace(number=1)
        return SimpleNamespace(count=1, told=0, untold=True, reached=0, owed=lambda: owed) if self.looks == 1 else None


def test_an_overlay_that_goes_while_the_status_is_told_is_no_crash() -> None:
    meter: Any = SimpleNamespace(longest=lambda: {}, describe=lambda: {})
    agent: Any = SimpleNamespace(
        overlays={7: Vanishing()}, containers={}, meter=meter, generation=1, blame="all", answered=0, doubtful=0,
        events=SimpleNamespace(crashes=0),
    )  # fmt: skip
    (shown,) = describe(agent)["overlays"]
    assert (shown["guarded"], shown["errors"]) == (True, 1)


def test_an_overlay_that_goes_while_an_error_is_settled_is_no_crash() -> None:
    upper: Any = SimpleNamespace(ledger=SimpleNamespace(newest=None))
    each = Vanishing()
    each.upper = upper
    agent: Any = SimpleNamespace(
        lock=threading.Lock(), overlays={7: each}, blame="owner", table=Table(), _skip=set(),
        _without_bystanders=lambda upper, owed: (seen.append(list(owed)), {})[1],
    )  # fmt: skip
    seen: list[list[int]] = []
    Agent._settle(agent, upper)
    assert seen == [[7]]


@pytest.mark.parametrize(("code", "said"), [(errno.EMFILE, ["Too many open files"]), (errno.ESRCH, [])])
def test_a_container_at_which_nobody_could_look_is_spoken_of_and_one_that_has_ended_is_not(
    code: int, said: list[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    events: list[str] = []
    agent: Any = SimpleNamespace(
        table=SimpleNamespace(mount_of=fail), events=SimpleNamespace(say=lambda _, why, **__: events.append(why))
    )
    opening.look_around(agent, Stand().container(1))
    assert [why.partition("] ")[2] for why in events] == said
