"""A state machine that does the same to the model and to real mounts, and compares every answer.

What can happen is asked of the model; each rule picks one of those of its name. No page stays dirty from one rule to
the next, because the next failure would take it along: so a write is written back, lost, or followed by a question that
finds the disk failing.
"""

import collections
from typing import Any, NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from overt.prove.checker import Checker, options, perform
from overt.prove.designs import DESIGNS
from overt.prove.history import Replay
from overt.prove.scope import WHOLE, Bound

from .reality import EIO, ENOSPC, Stage, World

BOUND = Bound(2, 3, 4)
ASKED = ("mount", "umount", "remount_ro", "remount_rw", "copy_fails", "syncfs", "fsync", "msync", "fsync_dir")
_FAILURES = {"lose": EIO, "lose_space": ENOSPC}


class Action(NamedTuple):
    """Verbs of the model, at one open file of one party (or at none), and what they are in reality."""

    party: int
    index: int
    verbs: tuple[str, ...]
    real: str = ""
    """empty: the same, one after the other; ``in_call``: the last one finds the disk failing; or a method of World"""


def doing(*names: str) -> Any:
    """The rule that does one of the `Both.ways` of these names."""

    def do(self: "Both", data: st.DataObject) -> None:
        ways = [action for name in names for action in self.ways[name]]
        self.act(ways[data.draw(st.integers(0, len(ways) - 1)) if len(ways) > 1 else 0])

    do.__name__ = "_or_".join(names)
    return precondition(lambda self: any(self.ways[name] for name in names))(rule(data=st.data())(do))


class Both(RuleBasedStateMachine):
    """The model and the real thing, side by side. Subclasses name the design and give it a stage."""

    design: str
    stage: Stage

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.world: World | None = None

    @initialize(kinds=st.tuples(st.booleans(), st.booleans()), mounted=st.integers(0, 3), mortal=st.integers(0, 7))
    def begin(self, kinds: tuple[bool, bool], mounted: int, mortal: int) -> None:
        """Often both are mounted. In one of eight histories the server may be killed, once: to start another takes
        half a second."""
        self.stage.host_syncfs()
        self.world = World(self.stage, kinds)
        self.model = Replay(Checker(DESIGNS[self.design], WHOLE, BOUND, kinds))
        self.mortal = DESIGNS[self.design].served and mortal == 7
        self.look_around()
        for action in self.ways["mount"] if mounted else ():
            self.act(action)

    # Those that are named twice are wanted more often.
    mount, umount, remount = doing("mount"), doing("umount"), doing("remount_ro", "remount_rw")
    open, open_write, close = doing("open"), doing("open_write", "copy_fails"), doing("close")
    write, lose, host_loses = doing("write", "write_sync"), doing("write_lost"), doing("lose", "lose_space")
    lose_again, lose_in_call = doing("write_lost"), doing("lost_in_call")
    syncfs, fsync = doing("syncfs"), doing("fsync", "fsync_dir")
    syncfs_again, fsync_or_msync = doing("syncfs"), doing("fsync", "msync")

    @precondition(lambda self: self.stage.group is not None and any(one.inode.wb_err for one in self.model.parties))
    @rule()
    def evict(self) -> None:
        """Where inodes of this disk alone can be evicted: everybody closes the file before."""
        number = next(number for number, party in enumerate(self.model.parties) if party.inode.wb_err)
        for index, file in enumerate(self.model.parties[number].files):
            if file.is_open:
                self.act(Action(number, index, ("close",)))
        self.act(Action(number, -1, ("evict",)))

    @precondition(lambda self: self.mortal and self.world.targets)
    @rule()
    def kill(self) -> None:
        """The server of all mounts."""
        self.mortal = False
        for number, party in enumerate(self.model.parties):
            if party.mounted and not party.host:
                self.model.do(number, "die", -1)
        self.said.append("the server is killed")
        self.world.die()
        self.look_around()

    def look_around(self) -> None:
        """What can happen next, by the rule that does it."""
        self.ways: dict[str, list[Action]] = collections.defaultdict(list)
        for number, party in enumerate(self.model.parties):
            for verb, index in options(WHOLE, BOUND, self.model.upper, party):
                self._offer(number, verb, index)

    def _offer(self, number: int, verb: str, index: int) -> None:
        """One that the model takes. Those of `_offer_writes` and `kill` are not alone."""
        model = self.model
        if perform(model.checker.design, model.upper.copy(), model.parties[number].copy(), verb, index) is None:
            return
        if verb == "write":
            self._offer_writes(number, index)
        elif verb not in ("write_back", "die") and (verb not in _FAILURES or number == self.world.host):
            self.ways[verb].append(Action(number, index, (verb,)))

    def _offer_writes(self, number: int, index: int) -> None:
        volatile = self.model.parties[number].volatile
        self.ways["write"].append(Action(number, index, ("write", "write_back")))
        if not volatile:
            self.ways["write_sync"].append(Action(number, index, ("write", "msync"), "write_sync"))
        if self.model.upper.errors >= BOUND.errors:
            return
        for failure in _FAILURES:
            self.ways["write_lost"].append(Action(number, index, ("write", failure)))
            if not volatile:
                for ask in ("syncfs", "fsync", "msync"):
                    self.ways["lost_in_call"].append(Action(number, index, ("write", failure, ask), "in_call"))

    def act(self, action: Action) -> None:
        """In both."""
        for position, verb in enumerate(action.verbs):
            fd, answer = self._of_the_model(action, verb)
            if not action.real:
                self._compare(action.party, verb, answer, self.world.do(action.party, verb, fd))
            elif action.real == "in_call" and position == 0:
                self.world.do(action.party, verb, fd)
            elif position == len(action.verbs) - 1:
                self._compare(action.party, f"{action.real} {verb}", answer, self._within(action, verb, fd))
        self.look_around()

    def _within(self, action: Action, verb: str, fd: int) -> int:
        if action.real == "in_call":
            return self.world.in_call(action.party, verb, fd, _FAILURES[action.verbs[1]])
        return self.world.do(action.party, action.real, fd)

    def _of_the_model(self, action: Action, verb: str) -> tuple[int, int]:
        index = action.index if verb not in ("write_back", *_FAILURES) else -1
        self.model.do(action.party, verb, index)
        return self.model.events[-1].fd, self.model.events[-1].errno

    def _compare(self, party: int, what: str, model: int, real: int) -> None:
        self.said.append(f"party {party}: {what}: model {model}, real {real}")
        assert what.split()[-1] not in ASKED or model == real, "\n".join(self.said)

    def teardown(self) -> None:
        if self.world is not None:
            self.world.close()
