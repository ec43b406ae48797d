"""The model is held against this machine's kernel, and against overt's own mounts: every answer must be the same."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from overt.prove.matrix import check, tasks
from overt.prove.scope import DEFAULT

from .machine import ASKED, Both
from .reality import EIO, Group, Stage, kernel_stage, overt_stage

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def group() -> Iterator[Group | None]:
    """None: inodes of one disk alone cannot be evicted here, and so are not."""
    try:
        found = Group()
    except OSError:
        yield None
        return
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def kernel(group: Group | None) -> Iterator[Stage]:
    with kernel_stage() as stage:
        stage.group = group
        yield stage


@pytest.fixture(scope="module")
def overt(group: Group | None) -> Iterator[Stage]:
    with overt_stage() as stage:
        stage.group = group
        yield stage


def histories(number: int) -> settings:
    """So many, of some twenty steps each; new ones each time."""
    health = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(
        max_examples=number, stateful_step_count=20, deadline=None, database=None, suppress_health_check=health,
        report_multiple_bugs=False, phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip


def agree(design: str, stage: Stage, number: int) -> None:
    machine = type(f"Beside{design.title()}", (Both,), {"design": design, "stage": stage})
    run_state_machine_as_test(machine, settings=histories(number))


def test_the_kernel_answers_as_the_model_of_mainline_does(kernel: Stage) -> None:
    agree("mainline", kernel, 200)


def test_overt_answers_as_its_model_does(overt: Stage) -> None:
    agree("overt", overt, 200)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_kernel_answers_as_the_model_does_in_two_thousand_histories(kernel: Stage) -> None:
    agree("mainline", kernel, 2000)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_overt_answers_as_its_model_does_in_two_thousand_histories(overt: Stage) -> None:
    agree("overt", overt, 2000)


@pytest.mark.parametrize("stage", ["kernel", "overt"])
def test_an_inode_that_was_evicted_has_forgotten_its_error(stage: str, request: pytest.FixtureRequest) -> None:
    """And one that was not has not: the state machine evicts where this can be done to one disk's inodes alone."""
    here: Stage = request.getfixturevalue(stage)
    if here.group is None:
        pytest.skip("no memory control group can be made here: nothing is evicted in the histories either")
    for evicted in (False, True):
        with here.world((False,)) as world:
            for verb, fd in (("mount", 0), ("open_write", 1), ("write", 1), ("lose", 0), ("close", 1)):
                world.do(0, verb, fd)
            if evicted:
                world.do(0, "evict", 0)
            world.do(0, "open", 2)
            assert world.do(0, "fsync", 2) == (0 if evicted else EIO)


@pytest.mark.timeout(240)
def test_every_counterexample_that_speaks_of_mainline_happens_on_the_kernel(kernel: Stage) -> None:
    """The aborted journal apart, which a disk does not survive."""
    shown = set()
    for task in tasks(["mainline"], DEFAULT, scopes=("syncfs", "fsync", "msync", "data", "remount")):
        for (use_case, _), history in check(task).broken.items():
            if kernel.group is None and any(event.verb == "evict" for event in history.events):
                continue
            kinds = tuple("volatile" in party for party in history.parties if party != "host")
            with kernel.world(kinds) as world:
                for event in history.events:
                    answer = world.do(event.party, event.verb, event.fd)
                    assert event.verb not in ASKED or answer == event.errno, (use_case, history, event, answer)
            shown.add(use_case)
    assert shown | {21} == {5, 6, 8, 9, 11, 12, 13, 15, 21, 22, 24, 25}


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
