"""A history: what happened, to whom, and what was answered; and how one is found again from the states that were
visited."""

from typing import NamedTuple

from overt.prove import claims
from overt.prove.checker import Checker, Place, options, perform
from overt.prove.verbs import VERBS
from overt.prove.world import Party, Upper


class Event(NamedTuple):
    """A line of a history."""

    party: int
    verb: str
    fd: int
    """the number of the open file, counted from 1 in the order of opening in that party; 0 if there is none"""
    errno: int
    """what was answered"""
    refused: bool
    """whether the verb was to mount, and it was refused"""


class History(NamedTuple):
    """What happened, in order."""

    parties: tuple[str, ...]
    events: tuple[Event, ...]
    due: str = ""
    """what the last answer had to be, if it was not"""


class Replay:
    """A world in which one thing happens after the other, each open file keeping its name."""

    def __init__(self, checker: Checker) -> None:
        self.checker = checker
        self.upper, self.parties = checker.scope.start(checker.bound, checker.kinds)
        self.names: list[list[int]] = [[0] * len(party.files) for party in self.parties]
        self.opened = [0] * len(self.parties)
        self.events: list[Event] = []

    def do(self, number: int, verb: str, index: int) -> None:
        """Do what is known to be possible."""
        party = self.parties[number]
        step = perform(self.checker.design, self.upper, party, verb, index)
        assert step is not None, f"{verb} is not possible here"
        if VERBS[verb].on == "free":
            self.names[number][index] = self.opened[number] + 1
            self.opened[number] += party.files[index].is_open
        fd = self.names[number][index] if index >= 0 else 0
        if step.error:
            for one in self.parties:
                claims.strike(one)
        code = step.call.answer.errno
        self.events.append(Event(number, verb, fd, code, verb == "mount" and code != 0))

    def follow(self, state: int) -> None:
        """Do whatever leads to this state of the checker's, which is a successor of the present one."""
        for number, party in enumerate(self.parties):
            for verb, index in options(self.checker.scope, self.checker.bound, self.upper, party):
                if self._leads_to(state, number, verb, index):
                    self.do(number, verb, index)
                    return
        raise AssertionError("no successor is like this one")

    def _leads_to(self, state: int, number: int, verb: str, index: int) -> bool:
        upper: Upper = self.upper.copy()
        parties: list[Party] = [party.copy() for party in self.parties]
        step = perform(self.checker.design, upper, parties[number], verb, index)
        if step is None:
            return False
        if step.error:
            for one in parties:
                claims.strike(one)
        return self.checker.pack(upper, parties) == state


def trace(checker: Checker, place: Place, due: str) -> History:
    """The history that leads to a transition which the checker has found, that transition included."""
    path = [place.state]
    while path[-1] != checker.start:
        path.append(checker.parents[path[-1]])
    replay = Replay(checker)
    for state in reversed(path[:-1]):
        replay.follow(state)
    # The last transition, in the replay's own order of parties and files: any that breaks what that one broke.
    number, verb, index = _last(checker, replay, place)
    replay.do(number, verb, index)
    return _only_who_acts(checker, tuple(replay.events), due)


def _last(checker: Checker, replay: Replay, place: Place) -> tuple[int, str, int]:
    wanted = _broken(checker, *checker.unpack(place.state), place.party, place.verb, place.file)
    for number, party in enumerate(replay.parties):
        for verb, index in options(checker.scope, checker.bound, replay.upper, party):
            if verb == place.verb and _broken(checker, replay.upper, replay.parties, number, verb, index) == wanted:
                return number, verb, index
    raise AssertionError("the violation is not there")


def _broken(
    checker: Checker, upper: Upper, parties: list[Party], number: int, verb: str, index: int
) -> set[claims.RuleId]:
    step = perform(checker.design, upper.copy(), parties[number].copy(), verb, index)
    return set() if step is None else {rule for rule, holds in step.verdicts.items() if not holds}


def _only_who_acts(checker: Checker, events: tuple[Event, ...], due: str) -> History:
    """Parties in the order in which they first do something, the host last; those that do nothing are left out."""
    host = len(checker.kinds)
    order = list(dict.fromkeys(event.party for event in events if event.party != host))
    order += [host] * any(event.party == host for event in events)
    letters = iter("ABCDEFGH")
    names = tuple(
        "host" if number == host else f"container {next(letters)} ({kind(checker.kinds[number])})" for number in order
    )
    return History(names, tuple(event._replace(party=order.index(event.party)) for event in events), due)


def kind(volatile: bool) -> str:
    """The word for a kind of mount."""
    return "volatile" if volatile else "ordinary"
