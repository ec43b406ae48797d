"""Designs x use cases: what is to be checked, what came out, and the verdicts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from overt.prove.checker import Checker, Report
from overt.prove.claims import CLAIMS, RuleId
from overt.prove.designs import DESIGNS
from overt.prove.history import History, trace
from overt.prove.scope import DEFAULT, SCOPES, Bound, mixes

SOLVED, UNSOLVED, UNKNOWN, NOT_APPLICABLE = "solved", "unsolved", "unknown", "not applicable"


class Task(NamedTuple):
    """One run of the checker; small, so that it can be sent to another process or machine."""

    design: str
    scope: str
    kinds: tuple[bool, ...]
    bound: Bound
    limit: int | None = None
    """how many states are visited at most"""


class Finding(NamedTuple):
    """What one run came to."""

    task: Task
    states: int
    transitions: int
    depth: int
    complete: bool
    seconds: float
    bytes: int
    broken: dict[RuleId, History]
    witnessed: frozenset[RuleId]


class Verdict(NamedTuple):
    """A cell of the matrix."""

    design: str
    use_case: int
    outcome: str
    reason: str = ""
    history: History | None = None


def tasks(
    designs: Sequence[str], bound: Bound, limit: int | None = None, scopes: Iterable[str] = SCOPES
) -> Iterator[Task]:
    """Everything that is to be checked, in order; the overlays in every mix of ordinary and volatile."""
    for design in designs:
        for scope in scopes:
            for kinds in mixes(bound.overlays):
                yield Task(design, scope, kinds, bound, limit)


def check(task: Task, report: Report | None = None) -> Finding:
    """Run the checker; histories are looked for while its states are still there."""
    checker = Checker(DESIGNS[task.design], SCOPES[task.scope], task.bound, task.kinds)
    result = checker.run(task.limit, report)
    broken = {}
    for rule, place in result.violations.items():
        use_case, index = rule
        broken[rule] = trace(checker, place, CLAIMS[use_case].rules[index].words)
    return Finding(
        task, result.states, result.transitions, result.depth, result.complete, result.seconds, result.bytes,
        broken, frozenset(result.witnessed),
    )  # fmt: skip


def verdicts(design: str, findings: Iterable[Finding], expected: int | None = None) -> list[Verdict]:
    """The verdict on each use case; `expected`: how many findings there would be, had nothing been stopped."""
    found = [finding for finding in findings if finding.task.design == design]
    missing = 0 if expected is None else expected - len(found)
    return [_verdict(design, number, found, missing) for number in CLAIMS]


def _verdict(design: str, number: int, findings: list[Finding], missing: int) -> Verdict:
    claim = CLAIMS[number]
    if claim.served and not DESIGNS[design].served:
        return Verdict(design, number, NOT_APPLICABLE, "the kernel serves its mounts itself")
    histories = [finding.broken[number, index] for index, _ in enumerate(claim.rules) for finding in findings
                 if (number, index) in finding.broken]  # fmt: skip
    if histories:
        return Verdict(design, number, UNSOLVED, "", min(histories, key=lambda history: len(history.events)))
    if missing:
        return Verdict(design, number, UNKNOWN, "stopped before all was checked")
    partial = [finding for finding in findings if not finding.complete]
    if partial:
        states = sum(finding.states for finding in findings)
        return Verdict(design, number, UNKNOWN, f"no violation in the first {states:,} states")
    seen = set().union(*(finding.witnessed for finding in findings))
    if any(rule.sometimes and (number, index) not in seen for index, rule in enumerate(claim.rules)):
        if any(finding.task.bound.is_below(DEFAULT) for finding in findings):
            return Verdict(design, number, UNKNOWN, "it does not come up within this bound")
        return Verdict(design, number, UNSOLVED, "it never comes to that: whoever would have to be told first is not")
    return Verdict(design, number, SOLVED)


def run(
    todo: Sequence[Task], spread: Callable[[Callable[[Task], Finding], Sequence[Task]], Iterable[Finding]] = map
) -> list[Finding]:
    """Check all; `spread` is map, or what does the same on several processors or machines, in any order."""
    order = {task: number for number, task in enumerate(todo)}
    return sorted(spread(check, todo), key=lambda finding: order[finding.task])
