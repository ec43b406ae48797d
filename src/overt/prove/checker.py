"""Every history within a scope, breadth first: whether each claim holds in all of them, or the shortest that breaks it.

How it is fast. Whatever happens is done to the upper and one party, so that what can follow from a state depends on
pairs: an upper and a party. Each distinct upper and each distinct party is kept once and has a number (what SPIN calls
collapse compression), and a state is one integer that is made of these numbers. For each pair, and not for each state,
the model runs: the verbs are tried on copies, the claims judge, and what follows is kept as a difference of two
integers:

    state       host | overlay 2 | overlay 1 | upper          bit fields of an int
    successor   state + difference[upper, party]              a look-up and an addition
    an error    the same, and every party is replaced by what it is after hearing of it

Claims are about a call, the upper, and the party that called; so they are judged with the pair too, and cost nothing
for each state. The first state in which a pair is met is one of the nearest to the start, breadth first, and so the
first violation has a shortest history.

Symmetry. Containers of one kind, and the descriptions of a party, are interchangeable: of all orders, the state with
the numbers in ascending order stands for all. What is visited, and in which order, is the same in each run.
"""

import sys
from collections.abc import Callable
from time import process_time
from typing import NamedTuple

from overt.prove import claims
from overt.prove.claims import Call, RuleId
from overt.prove.design import Design
from overt.prove.scope import Bound, Scope
from overt.prove.verbs import VERBS
from overt.prove.world import File, Party, Upper

UPPER_BITS, PARTY_BITS = 12, 18
_UPPER, _PARTY = (1 << UPPER_BITS) - 1, (1 << PARTY_BITS) - 1
_REPORT = 1 << 16

NOWHERE = File()


class Place(NamedTuple):
    """A transition out of a state: which party, by which verb, at which of its open files (or -1)."""

    state: int
    party: int
    verb: str
    file: int


class Result(NamedTuple):
    """What was found."""

    states: int
    transitions: int
    depth: int
    complete: bool
    """whether every state within the scope was visited"""
    seconds: float
    """of processor time"""
    bytes: int
    """memory of the states visited, their parents included"""
    violations: dict[RuleId, Place]
    """the first transition, of those nearest to the start, that breaks a rule"""
    witnessed: set[RuleId]
    """rules whose situation arose, with the answer that it must have"""


Report = Callable[[int], None]
"""called now and then with the number of states so far"""


class Checker:
    """One design in one scope with one mix of overlays."""

    def __init__(
        self, design: Design, scope: Scope, bound: Bound, kinds: tuple[bool, ...], *, symmetry: bool = True
    ) -> None:
        """`kinds`: whether each overlay is volatile. Without `symmetry` all orders of containers are told apart."""
        self.design, self.scope, self.bound, self.kinds = design, scope, bound, kinds
        self.symmetry = symmetry
        self.parents: dict[int, int] = {}
        self.uppers: list[Upper] = []
        self.parties: list[Party] = []
        self._upper_numbers: dict[object, int] = {}
        self._party_numbers: dict[object, int] = {}
        self._met: dict[object, int] = {}
        """the numbers of parties, by the form in which they came"""
        self._outcomes: dict[tuple[int, int], list[_Outcome]] = {}
        self._struck: dict[int, int] = {}
        self.violations: dict[RuleId, Place] = {}
        self.witnessed: set[RuleId] = set()
        upper, parties = scope.start(bound, kinds)
        self.shifts = [UPPER_BITS + PARTY_BITS * number for number in range(len(parties))]
        self.start = self.number_upper(upper)
        for shift, party in zip(self.shifts, parties, strict=True):
            self.start |= self.number_party(party) << shift

    def run(self, limit: int | None = None, report: Report | None = None) -> Result:
        """Visit every state, or the first `limit`."""
        begun = process_time()
        parents, start = self.parents, self.start
        parents[start] = start
        frontier, depth, transitions = [start], 0, 0
        due = _REPORT if limit is None else min(limit, _REPORT)
        arrange = self._arrangement()
        # The host's moves leave the overlays as they are, and so in order.
        slots: list[_Slot] = [
            (number, shift, {}, arrange if number < len(self.kinds) else None)
            for number, shift in enumerate(self.shifts)
        ]
        while frontier:
            following: list[int] = []
            for state in frontier:
                upper = state & _UPPER
                for number, shift, known, order in slots:
                    pair = (state >> shift & _PARTY) << UPPER_BITS | upper
                    found = known.get(pair)
                    if found is None:
                        found = known[pair] = self._moves(state, number)
                    differences, errors = found
                    transitions += len(differences)
                    if order is None:
                        for difference in differences:
                            new = state + difference
                            if new not in parents:
                                parents[new] = state
                                following.append(new)
                    else:
                        for difference in differences:
                            new = order(state + difference)
                            if new not in parents:
                                parents[new] = state
                                following.append(new)
                    for difference in errors:
                        transitions += 1
                        new = self._broadcast(state + difference)
                        if arrange is not None:
                            new = arrange(new)
                        if new not in parents:
                            parents[new] = state
                            following.append(new)
                if len(parents) >= due:
                    if limit is not None and len(parents) >= limit:
                        return self._result(transitions, depth, False, begun)
                    due += _REPORT if limit is None else min(_REPORT, limit - due)
                    if report is not None:
                        report(len(parents))
            frontier = following
            depth += bool(frontier)
        return self._result(transitions, depth, True, begun)

    def _result(self, transitions: int, depth: int, complete: bool, begun: float) -> Result:
        seconds = process_time() - begun
        states = len(self.parents)
        size = sys.getsizeof(self.parents) + states * sys.getsizeof(max(self.parents))
        return Result(states, transitions, depth, complete, seconds, size, dict(self.violations), set(self.witnessed))

    # Numbers

    def number_upper(self, upper: Upper) -> int:
        """The number of this upper."""
        self.scope.project_upper(upper, self.kinds)
        number = self._upper_numbers.setdefault(upper.key(), len(self.uppers))
        if number == len(self.uppers):
            if number > _UPPER:
                raise OverflowError("too many uppers for their bit field")
            self.uppers.append(upper)
        return number

    def number_party(self, party: Party) -> int:
        """The number of this party, brought into the form that stands for all that are alike."""
        as_it_came = party.key()
        number = self._met.get(as_it_came)
        if number is None:
            number = self._met[as_it_came] = self._number_settled(party)
        return number

    def _number_settled(self, party: Party) -> int:
        self.scope.project_party(party)
        self.design.settle(party)
        party.files.sort(key=lambda file: (not file.is_open, file.key()))
        number = self._party_numbers.setdefault(party.key(), len(self.parties))
        if number == len(self.parties):
            if number > _PARTY:
                raise OverflowError("too many parties for their bit field")
            self.parties.append(party)
        return number

    def unpack(self, state: int) -> tuple[Upper, list[Party]]:
        """Copies of what a state is made of."""
        return self.uppers[state & _UPPER].copy(), [
            self.parties[state >> shift & _PARTY].copy() for shift in self.shifts
        ]

    def pack(self, upper: Upper, parties: list[Party]) -> int:
        """The state that is made of copies of these."""
        state = self.number_upper(upper.copy())
        for shift, party in zip(self.shifts, parties, strict=True):
            state |= self.number_party(party.copy()) << shift
        arrange = self._arrangement()
        return arrange(state) if arrange else state

    # Successors

    def _moves(self, state: int, number: int) -> "_Moves":
        """What can happen to the upper and a party of this state, as differences; errors apart."""
        shift = self.shifts[number]
        before, party_before = state & _UPPER, state >> shift & _PARTY
        differences: dict[int, None] = {}
        errors: dict[int, None] = {}
        for upper, party, is_error in self._outcomes_of(before, party_before, state, number):
            difference = upper - before + (party - party_before << shift)
            if is_error:
                errors[difference] = None
            elif difference:
                differences[difference] = None
        return tuple(differences), tuple(errors)

    def _outcomes_of(self, upper_before: int, party_before: int, state: int, number: int) -> "list[_Outcome]":
        """What can become of an upper and a party. The first time they are met, which is here, the claims judge."""
        known = self._outcomes.get((upper_before, party_before))
        if known is not None:
            return known
        found = self._outcomes[upper_before, party_before] = []
        upper, party = self.uppers[upper_before].copy(), self.parties[party_before].copy()
        for verb, index in options(self.scope, self.bound, upper, party):
            step = perform(self.design, upper, party, verb, index)
            if step is None:  # nothing has changed
                continue
            for rule, holds in step.verdicts.items():
                if holds:
                    self.witnessed.add(rule)
                else:
                    self.violations.setdefault(rule, Place(state, number, verb, index))
            found.append((self.number_upper(upper), self.number_party(party), step.error))
            upper, party = self.uppers[upper_before].copy(), self.parties[party_before].copy()
        return found

    def _broadcast(self, state: int) -> int:
        """Every party hears of an error."""
        new = state & _UPPER
        for shift in self.shifts:
            number = state >> shift & _PARTY
            struck = self._struck.get(number)
            if struck is None:
                party = self.parties[number].copy()
                claims.strike(party)
                struck = self._struck[number] = self.number_party(party)
            new |= struck << shift
        return new

    def _arrangement(self) -> Callable[[int], int] | None:
        """The function that puts interchangeable overlays in order; None where there are none."""
        groups = [[s for s, kind in zip(self.shifts, self.kinds, strict=False) if kind == which] for which in (0, 1)]
        groups = [group for group in groups if len(group) > 1]
        if not groups or not self.symmetry:
            return None
        if len(groups) == 1 and len(groups[0]) == 2:
            low, high = groups[0]
            swap, apart = (1 << low) - (1 << high), high - low
            one, other = _PARTY << low, _PARTY << high

            def pair(state: int) -> int:
                if (state & one) << apart <= state & other:
                    return state
                return state - ((state >> low & _PARTY) - (state >> high & _PARTY)) * swap

            return pair

        def many(state: int) -> int:
            for group in groups:
                numbers = [state >> shift & _PARTY for shift in group]
                for shift, was, number in zip(group, numbers, sorted(numbers), strict=True):
                    state += number - was << shift
            return state

        return many


_Outcome = tuple[int, int, bool]
"""an upper, a party, and whether it is an error, of which the other parties hear"""
_Moves = tuple[tuple[int, ...], tuple[int, ...]]
_Slot = tuple[int, int, dict[int, _Moves], Callable[[int], int] | None]
"""a party's number, where it is in a state, what can happen to it, and what brings a state into order afterwards"""


class Step(NamedTuple):
    """What came of a verb."""

    call: Call
    verdicts: dict[RuleId, bool]
    """of the rules whose situation this was"""
    error: bool
    """whether it recorded an error, of which the parties are still to hear (`claims.strike`)"""


def options(scope: Scope, bound: Bound, upper: Upper, party: Party) -> list[tuple[str, int]]:
    """The verbs that are worth trying on a party, in order: each with the index of an open file, or -1."""
    found: list[tuple[str, int]] = []
    for name in scope.host if party.host else scope.overlay:
        on = VERBS[name].on
        if VERBS[name].error and upper.errors >= bound.errors:
            continue
        if not on:
            found.append((name, -1))
            continue
        places = [index for index, file in enumerate(party.files) if file.is_open == (on == "open")]
        found += [(name, index) for index in (places if on == "open" else places[:1])]
    return found


def perform(design: Design, upper: Upper, party: Party, verb: str, index: int) -> Step | None:
    """Do a verb to an upper and a party, judge, and remember; None if it cannot happen here."""
    file = party.files[index] if index >= 0 else NOWHERE
    answer = VERBS[verb].do(design, upper, party, file)
    if answer is None:
        return None
    call = Call(verb, upper, party, file, answer)
    verdicts = claims.judge(call)
    return Step(call, verdicts, claims.remember(call))
