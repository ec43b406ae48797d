"""The checker: what it visits, symmetry, that a history is a shortest one, and that scopes leave nothing out."""

import itertools

import pytest

from overt.prove import claims
from overt.prove.census import Census
from overt.prove.checker import Checker, options, perform
from overt.prove.designs import DESIGNS
from overt.prove.history import Replay, trace
from overt.prove.scope import SCOPES, WHOLE, Bound, mixes

pytestmark = pytest.mark.timeout(180)
SMALL = Bound(2, 1, 1)


@pytest.mark.parametrize("design", DESIGNS)
def test_symmetry_changes_the_number_of_states_and_no_verdict(design: str) -> None:
    for scope in SCOPES.values():
        with_it = Checker(DESIGNS[design], scope, SMALL, (False, False)).run()
        without = Checker(DESIGNS[design], scope, SMALL, (False, False), symmetry=False).run()
        assert with_it.states < without.states < 2 * with_it.states
        assert set(with_it.violations) == set(without.violations)
        assert with_it.witnessed == without.witnessed
        assert with_it.depth == without.depth


def breaks_the_same(design: str, bound: Bound, volatile: bool) -> None:
    whole = Checker(DESIGNS[design], WHOLE, bound, (volatile,)).run().violations
    parts: set[claims.RuleId] = set()
    for name in ("syncfs", "fsync", "msync", "data", "remount"):
        parts |= set(Checker(DESIGNS[design], SCOPES[name], bound, (volatile,)).run().violations)
    assert set(whole) == parts


@pytest.mark.parametrize("design", DESIGNS)
def test_what_scopes_leave_out_changes_no_verdict(design: str) -> None:
    """All verbs in one world, and nothing left out of the state, break the same claims as the scopes one by one."""
    for volatile in (False, True):
        breaks_the_same(design, Bound(1, 1, 1), volatile)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("design", DESIGNS)
def test_nor_does_it_with_two_descriptors(design: str) -> None:
    for volatile in (False, True):
        breaks_the_same(design, Bound(1, 2, 1), volatile)


@pytest.mark.parametrize("design", DESIGNS)
def test_no_design_tells_a_volatile_mount_every_time_once_it_is_read_only(design: str) -> None:
    """What U4 and U25 leave out, and the page says so."""
    checker = Checker(DESIGNS[design], SCOPES["remount"], SMALL, (True, True))
    replay = Replay(checker)
    host = len(checker.kinds)
    for party, verb, index in ((0, "mount", -1), (host, "lose", -1), (0, "remount_ro", -1), (0, "open", 0)):
        replay.do(party, verb, index)
    for _ in range(2):
        replay.do(0, "syncfs", 0)
    assert [event.errno for event in replay.events[-2:]] == [5 if design == "check_error" else 0, 0]


def test_two_runs_visit_the_same_states_in_the_same_order() -> None:
    runs = [Checker(DESIGNS["overt"], SCOPES["data"], SMALL, (False, True)) for _ in range(2)]
    for checker in runs:
        checker.run()
    assert list(runs[0].parents.items()) == list(runs[1].parents.items())
    assert runs[0].violations == runs[1].violations


def plain_search(checker: Checker, rule: claims.RuleId) -> int:
    """The length of the shortest history that breaks a rule, found the slow way: whole worlds, and no numbers."""
    upper, parties = checker.scope.start(checker.bound, checker.kinds)
    level, seen = [(upper, parties)], set()
    for length in itertools.count(1):
        following = []
        for upper, parties in level:
            for number, party in enumerate(parties):
                for verb, index in options(checker.scope, checker.bound, upper, party):
                    after, others = upper.copy(), [one.copy() for one in parties]
                    step = perform(checker.design, after, others[number], verb, index)
                    if step is None:
                        continue
                    if step.verdicts.get(rule) is False:
                        return length
                    if step.error:
                        for one in others:
                            claims.strike(one)
                    key = (after.key(), *(one.key() for one in others))
                    if key not in seen:
                        seen.add(key)
                        following.append((after, others))
        level = following
    raise AssertionError


@pytest.mark.parametrize(
    ("design", "rule", "length"), [("mainline", (5, 0), 4), ("check_error", (12, 0), 7), ("check_error", (10, 0), 6)]
)
def test_a_history_is_a_shortest_one(design: str, rule: claims.RuleId, length: int) -> None:
    checker = Checker(DESIGNS[design], SCOPES["syncfs"], SMALL, (False, False))
    history = trace(checker, checker.run().violations[rule], "")
    assert len(history.events) == length == plain_search(checker, rule)


def test_a_search_can_be_bounded_and_says_so() -> None:
    result = Checker(DESIGNS["overt"], SCOPES["syncfs"], Bound(2, 2, 2), (False, False)).run(limit=7_000)
    assert not result.complete
    assert 7_000 <= result.states < 7_100


def test_a_state_costs_less_than_two_hundred_bytes() -> None:
    result = Checker(DESIGNS["overt"], SCOPES["syncfs"], Bound(2, 2, 1), (False, False)).run()
    assert result.bytes / result.states < 200


# The mail's arithmetic


def test_with_check_error_one_of_a_thousand_new_descriptors_is_told() -> None:
    for volatile in (False, True):
        census = Census(DESIGNS["check_error"], volatile=volatile)
        for containers in (1, 2, 3, 10, 1000):
            assert census.told(containers) == {1}


@pytest.mark.parametrize("design", DESIGNS)
def test_counting_containers_finds_what_telling_them_apart_finds(design: str) -> None:
    for containers in range(1, 7):
        assert Census(DESIGNS[design]).told(containers) == Census(DESIGNS[design]).told(containers, symmetry=False)


def test_overt_and_the_variation_tell_each_of_a_thousand_and_mainline_none() -> None:
    told = {design: Census(DESIGNS[design]).told(1000) for design in ("overt", "goldstein", "mainline")}
    assert told == {"overt": {1000}, "goldstein": {1000}, "mainline": {0}}


def test_with_check_error_as_many_are_told_as_opened_before_the_first_one_asked() -> None:
    """A descriptor samples an unseen error as none: the mail's number is for containers that ask at once."""
    assert Census(DESIGNS["check_error"], dawdling=True).told(5) == {1, 2, 3, 4, 5}
    assert Census(DESIGNS["check_error"], dawdling=True).told(4, symmetry=False) == {1, 2, 3, 4}


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_overt_breaks_no_must_in_the_deeper_world() -> None:
    """Three overlays, three descriptors each, three errors; as far as ten million states go."""
    for scope in SCOPES.values():
        for kinds in mixes(3):
            result = Checker(DESIGNS["overt"], scope, Bound(3, 3, 3), kinds).run(limit=10_000_000)
            print(scope.name, kinds, result.states, "all" if result.complete else "not all")
            assert {number for number, _ in result.violations} <= {21, 22, 23}
