"""A scenario played with one system on one upper: the verdict, and the history that shows it.

    holds            every answer was what the claim says
    violated         one was not
    unknown          nothing can be said: what had to be so first was not, or the fault did not happen
    not applicable   the claim is not about such a mount, or this cannot be done to it

A history stops at the step that decides. Before it counts, the witness is asked whether there was a fault at all: a
system that says "all is well" is right if it is.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from overt.judge.scenario import Nonsense, Scenario, Step
from overt.judge.stage import Premise, Stage, staged
from overt.judge.systems import NotApplicable, Refused, System

_TRIES = 30

HOLDS, VIOLATED, UNKNOWN, NOT_APPLICABLE, FLAKY = "holds", "violated", "unknown", "not applicable", "flaky"


class Call(NamedTuple):
    """A line of a history."""

    at: float
    """seconds since the scenario began"""
    who: str
    call: str
    answer: str
    due: str
    """what the claim wants; empty: nothing"""
    fits: bool
    disk: str
    """what the disk did meanwhile: "3 writes, 1 refused, 2 flushes" """


class Outcome(NamedTuple):
    """What became of a cell."""

    scenario: str
    system: str
    upper: str
    verdict: str
    reason: str
    history: tuple[Call, ...] = ()
    seconds: float = 0.0
    runs: tuple[str, ...] = ()
    """the verdict of each run, if there was more than one"""

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "history": [call._asdict() for call in self.history]}


def outside(scenario: Scenario, system: System, upper: str) -> str | None:
    """Why a claim is not about such a mount; None if it is."""
    if system.kind not in scenario.mounts:
        return f"the claim is about {' and '.join(scenario.mounts)} mounts"
    if scenario.layers and not system.layered:
        return "it has no lower layers"
    if scenario.uppers and upper not in scenario.uppers:
        return f"it cannot happen on {upper}"
    return None


def play(scenario: Scenario, system: System, upper: str, base: str) -> Outcome:
    """Find out. For a process of its own, which it leaves with other namespaces; `base`: an empty directory."""
    began = time.monotonic()
    history: list[Call] = []

    def outcome(verdict: str, reason: object = "") -> Outcome:
        seconds = round(time.monotonic() - began, 3)
        return Outcome(scenario.id, system.name, upper, verdict, _line(reason), tuple(history), seconds)

    why = outside(scenario, system, upper)
    if why:
        return outcome(NOT_APPLICABLE, why)
    why = system.missing()
    if why:
        return outcome(UNKNOWN, why)
    try:
        with staged(scenario, system, upper, base) as stage:
            try:
                broken = _perform(scenario, stage, history)
                doubt = _doubt(scenario, stage)
            except NotApplicable as error:
                return outcome(NOT_APPLICABLE, error)
            except Premise as error:
                return outcome(UNKNOWN, error)
            if doubt:
                return outcome(UNKNOWN, doubt)
            return outcome(VIOLATED, broken) if broken else outcome(HOLDS)
    except Refused as error:
        return outcome(UNKNOWN, f"{system.name}: {error}")
    except Nonsense as error:
        return outcome(UNKNOWN, f"the scenario makes no sense: {error}")
    except OSError as error:
        return outcome(UNKNOWN, error.strerror or error)


def _perform(scenario: Scenario, stage: Stage, history: list[Call]) -> str:
    """Do the steps, up to the one that breaks the claim; what broke it, or nothing."""
    began = time.monotonic()
    for step in scenario.steps:
        broken = ""
        for who in _each(step, scenario):
            before = stage.counters()
            at = time.monotonic() - began
            answer = stage.do(who, step.name, step.verb, step.words)
            fits = step.fits(answer)
            did = _difference(before, stage.counters())
            shown = f"{answer}: {stage.why}" if stage.why else answer
            history.append(Call(round(at, 4), who, step.call, shown, "|".join(step.due), fits, did))
            if not fits and not step.due:
                raise Premise(f"{who}: {step.call}: {shown}")
            if not fits:
                broken = broken or f"{who}: {step.call}: {shown}, due {'|'.join(step.due)}"
        if broken:
            return broken
    return ""


def _each(step: Step, scenario: Scenario) -> Iterator[str]:
    yield from scenario.letters if step.who == "each" else (step.who,)


def _doubt(scenario: Scenario, stage: Stage) -> str:
    """Why the fault may not have happened, asked when all is done."""
    if not scenario.has_fault:
        return ""
    if stage.armed:  # the claim was broken before the disk was asked: let it be asked now
        for _ in range(_TRIES):  # what a FUSE filesystem has in its cache comes in its own time
            stage.disk_push()
            if stage.refused():
                break
            time.sleep(0.1)
        stage.disk.heal()
    if not stage.refused():
        return "the disk was not asked for anything that it should refuse"
    if scenario.witness == "cursor" and not stage.tells():
        return "the witness on the plain upper saw no error"
    return ""


def _difference(before: Any, after: Any) -> str:
    """What the disk did between two counts, in words."""
    refused = sum(getattr(after, name) - getattr(before, name) for name in after._fields if name.startswith("failed"))
    counts = [(after.writes - before.writes, "write"), (after.flushes - before.flushes, "flush")]
    words = [f"{count} {noun}{('es' if noun == 'flush' else 's') * (count != 1)}" for count, noun in counts if count]
    return ", ".join([*words, *([f"{refused} refused"] if refused else [])])


def _line(words: object) -> str:
    return " ".join(str(words).split())
