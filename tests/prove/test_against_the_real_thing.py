"""The model is held against this machine's kernel, and against overt's own mounts: every answer must be the same."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overt.prove.checker import Checker, options
from overt.prove.designs import DESIGNS
from overt.prove.history import Replay
from overt.prove.matrix import check, tasks
from overt.prove.scope import DEFAULT, WHOLE, Bound

from .reality import Stage, World, kernel_stage, overt_stage

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

BOUND = Bound(2, 3, 4)
ASKED = ("mount", "umount", "syncfs", "fsync")

Action = tuple[tuple[int, str, int], ...]
"""verbs that go together: no page stays dirty, because the next failure would take it along"""


@pytest.fixture(scope="module")
def kernel() -> Iterator[Stage]:
    with kernel_stage() as stage:
        yield stage


@pytest.fixture(scope="module")
def overt() -> Iterator[Stage]:
    with overt_stage() as stage:
        yield stage


class Both:
    """The model and the real thing, side by side."""

    def __init__(self, design: str, kinds: tuple[bool, ...], world: World) -> None:
        self.model = Replay(Checker(DESIGNS[design], WHOLE, BOUND, kinds))
        self.world = world
        self.said: list[str] = []

    def actions(self) -> list[Action]:
        """What can happen next."""
        found: list[Action] = []
        for number, party in enumerate(self.model.parties):
            for verb, index in options(WHOLE, BOUND, self.model.upper, party):
                possible = {
                    "mount": not party.mounted,
                    "umount": party.mounted and not any(file.is_open for file in party.files),
                    "open": party.mounted,
                    "open_write": party.mounted,
                    "lose": party.host,
                    "write": not party.host and index >= 0 and party.files[index].writable,
                }
                if verb == "write" and possible["write"]:
                    found.append(((number, "write", index), (number, "write_back", -1)))
                    if self.model.upper.errors < BOUND.errors:
                        lost = ((number, "write", index), (number, "lose", -1))
                        found.append(lost)
                        if not party.volatile:
                            found += [(*lost, (number, ask, index)) for ask in ("syncfs", "fsync")]
                elif possible.get(verb, verb in ("syncfs", "fsync", "close")):
                    found.append(((number, verb, index),))
        return found

    def do(self, action: Action) -> None:
        """In both; a loss that is followed by a question happens within the question."""
        in_call = len(action) == 3
        for number, verb, index in action:
            self.model.do(number, verb, index)
            event = self.model.events[-1]
            if in_call and verb == "lose":
                continue
            do = self.world.in_call if in_call and verb in ASKED else self.world.do
            answer = do(number, verb, event.fd)
            self.said.append(f"party {number}: {verb} fd {event.fd}: model {event.errno}, real {answer}")
            assert verb not in ASKED or answer == event.errno, "\n".join(self.said)


def agree(design: str, stage: Stage, kinds: tuple[bool, ...], choices: list[int]) -> None:
    """A history in which each choice picks one of the things that can happen."""
    with stage.world(kinds) as world:
        both = Both(design, kinds, world)
        for choice in choices:
            actions = both.actions()
            both.do(actions[choice % len(actions)])


HISTORIES = {
    "kinds": st.tuples(st.booleans(), st.booleans()),
    "choices": st.lists(st.integers(0, 1 << 16), min_size=8, max_size=40),
}
HABITS = {
    "deadline": None,
    "database": None,
    "derandomize": False,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
}
SOME = settings(max_examples=200, **HABITS)
MANY = settings(max_examples=2000, **HABITS)


@SOME
@given(**HISTORIES)
def test_the_kernel_answers_as_the_model_of_mainline_does(kernel: Stage, kinds, choices) -> None:
    agree("mainline", kernel, kinds, choices)


@SOME
@given(**HISTORIES)
def test_overt_answers_as_its_model_does(overt: Stage, kinds, choices) -> None:
    agree("overt", overt, kinds, choices)


@pytest.mark.long
@pytest.mark.timeout(1800)
@MANY
@given(**HISTORIES)
def test_the_kernel_answers_as_the_model_does_in_two_thousand_histories(kernel: Stage, kinds, choices) -> None:
    agree("mainline", kernel, kinds, choices)


@pytest.mark.long
@pytest.mark.timeout(1800)
@MANY
@given(**HISTORIES)
def test_overt_answers_as_its_model_does_in_two_thousand_histories(overt: Stage, kinds, choices) -> None:
    agree("overt", overt, kinds, choices)


@pytest.mark.timeout(240)
def test_every_counterexample_that_speaks_of_mainline_happens_on_the_kernel(kernel: Stage) -> None:
    """The aborted journal apart, which a disk does not survive."""
    shown = set()
    for task in tasks(["mainline"], DEFAULT, scopes=("syncfs", "fsync", "data")):
        for (use_case, _), history in check(task).broken.items():
            kinds = tuple("volatile" in party for party in history.parties if party != "host")
            with kernel.world(kinds) as world:
                for event in history.events:
                    answer = world.do(event.party, event.verb, event.fd)
                    assert event.verb not in ASKED or answer == event.errno, (use_case, history, event, answer)
            shown.add(use_case)
    assert shown == {5, 6, 8, 9, 11, 12, 13, 15, 21, 22, 24}


def test_an_aborted_journal_is_answered_once_on_the_kernel_as_in_the_model() -> None:
    """The counterexample to U19; and nobody else is told either, whoever asks."""
    (task, *_) = tasks(["mainline"], DEFAULT, scopes=("abort",))
    history = check(task).broken[19, 0]
    with kernel_stage() as stage, stage.world((False, False)) as world:
        world.do(1, "mount", 0)
        world.do(1, "open", 1)
        for event in history.events:
            party = world.host if event.verb == "abort" else event.party
            answer = world.do(party, event.verb, event.fd)
            assert event.verb not in ASKED or answer == event.errno
        assert history.events[-1].errno == 0
        assert world.do(1, "syncfs", 1) == 0
