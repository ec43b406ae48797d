"""The mail's own arithmetic: N overlays, one writeback error, one syncfs on a new fd in each. How many are told?

Every order is looked at. With symmetry a state is the upper and *how many* containers are in each condition (a counting
abstraction), so that N can be a thousand; without it, a state says of each container in which condition it is. Both
must find the same.

A container asks at once with the descriptor that it has opened. If they may dawdle, all open before the first one asks,
and each has sampled an error that nobody has seen: then as many are told as were quick to open.
"""

from collections.abc import Iterator

from overt.prove import claims
from overt.prove.checker import perform
from overt.prove.design import Design
from overt.prove.world import File, Party, Upper

_AT_ONCE = (("mount",), ("open", "syncfs"))
_DAWDLING = (("mount",), ("open",), ("syncfs",))
State = tuple[int, tuple[int, ...]]


class Census:
    """A design, and containers that each do the same once: all mount, the error, then each opens and asks."""

    def __init__(self, design: Design, *, volatile: bool = False, dawdling: bool = False) -> None:
        """`dawdling`: whether others may act between a container's opening and its asking."""
        self.design = design
        self._script = _DAWDLING if dawdling else _AT_ONCE
        self._uppers: list[Upper] = []
        self._parties: list[tuple[Party, int, bool]] = []
        """a condition: the party, how far in the script it is, and whether it was told"""
        self._numbers: dict[object, int] = {}
        self._steps: dict[tuple[int, int], tuple[int, int]] = {}
        self.states = 0
        self._new = Party(volatile=volatile, files=[File()])

    def told(self, containers: int, *, symmetry: bool = True) -> set[int]:
        """How many of `containers` were told in the end: every number that some order leads to."""
        start = self._after_the_error(containers, symmetry)
        seen, todo, ends = {start}, [start], set()
        while todo:
            state = todo.pop()
            following = list(self._successors(state, symmetry))
            if not following:
                ends.add(self._count(state, symmetry))
            for new in following:
                if new not in seen:
                    seen.add(new)
                    todo.append(new)
        self.states = len(seen)
        return ends

    def _after_the_error(self, containers: int, symmetry: bool) -> State:
        upper = Upper()
        parties = [self._new.copy() for _ in range(containers)]
        for party in parties:
            perform(self.design, upper, party, "mount", -1)
        host = Party(host=True, mounted=True)
        perform(self.design, upper, host, "lose", -1)
        numbers = []
        for party in parties:
            claims.strike(party)
            numbers.append(self._number(party, 1, False))
        return self._upper(upper), _counted(numbers) if symmetry else tuple(numbers)

    def _successors(self, state: State, symmetry: bool) -> Iterator[State]:
        upper, conditions = state
        if not symmetry:
            for place, number in enumerate(conditions):
                if self._parties[number][1] < len(self._script):
                    after, new = self._step(upper, number)
                    yield after, (*conditions[:place], new, *conditions[place + 1 :])
            return
        for number, count in enumerate(conditions):
            if count and self._parties[number][1] < len(self._script):
                after, new = self._step(upper, number)
                counts = list(conditions) + [0] * (new + 1 - len(conditions))
                counts[number] -= 1
                counts[new] += 1
                yield after, tuple(counts)

    def _step(self, upper: int, number: int) -> tuple[int, int]:
        """What the next step of the script makes of an upper and a container."""
        if (upper, number) not in self._steps:
            after = self._uppers[upper].copy()
            known, done, told = self._parties[number]
            party = known.copy()
            for verb in self._script[done]:
                step = perform(self.design, after, party, verb, -1 if verb == "mount" else 0)
                assert step is not None
                told = told or step.call.answer.errno != 0
            self._steps[upper, number] = self._upper(after), self._number(party, done + 1, told)
        return self._steps[upper, number]

    def _upper(self, upper: Upper) -> int:
        number = self._numbers.setdefault(upper.key(), len(self._uppers))
        if number == len(self._uppers):
            self._uppers.append(upper)
        return number

    def _number(self, party: Party, done: int, told: bool) -> int:
        number = self._numbers.setdefault((party.key(), done, told), len(self._parties))
        if number == len(self._parties):
            self._parties.append((party, done, told))
        return number

    def _count(self, state: State, symmetry: bool) -> int:
        if symmetry:
            return sum(count for number, count in enumerate(state[1]) if self._parties[number][2])
        return sum(self._parties[number][2] for number in state[1])


def _counted(numbers: list[int]) -> tuple[int, ...]:
    return tuple(numbers.count(number) for number in range(max(numbers) + 1))
