"""What was found, for people and for programs."""

from typing import Any

from rich.box import MINIMAL
from rich.table import Table
from rich.text import Text

from overt.prove import timeline
from overt.prove.claims import CLAIMS
from overt.prove.designs import DESIGNS
from overt.prove.matrix import NOT_APPLICABLE, SOLVED, UNKNOWN, UNSOLVED, Finding, Verdict
from overt.prove.scope import Bound

MARKS = {SOLVED: ("yes", "green"), UNSOLVED: ("NO", "red"), UNKNOWN: ("?", "yellow"), NOT_APPLICABLE: ("-", "dim")}
OURS = ("overt",)
"""the designs whose promises are ours"""


def breaks_a_promise(verdict: Verdict) -> bool:
    """Whether there is a history in which overt breaks a must; a small world may have none in which it comes up."""
    return verdict.design in OURS and CLAIMS[verdict.use_case].must and verdict.history is not None


def table(verdicts: list[Verdict]) -> Table:
    """The matrix: must first, then nice."""
    designs = list(dict.fromkeys(verdict.design for verdict in verdicts))
    cells = {(verdict.use_case, verdict.design): verdict.outcome for verdict in verdicts}
    found = Table(box=MINIMAL, show_edge=False, padding=(0, 1, 0, 0))
    found.add_column("")
    found.add_column("use case")
    for design in designs:
        found.add_column(design.replace("-", "\n").replace("_", "_\n"), justify="right", vertical="bottom")
    for must in (True, False):
        rows = [number for number, claim in CLAIMS.items() if claim.must == must]
        for number in rows:
            marks = [Text(*MARKS[cells[number, design]]) for design in designs]
            found.add_row(f"U{number}", CLAIMS[number].text, *marks, end_section=must and number == rows[-1])
    return found


def totals(findings: list[Finding], bound: Bound, expected: int) -> list[str]:
    """How much was looked at; `expected`: how many runs there would be, had nothing been stopped."""
    states = sum(finding.states for finding in findings)
    seconds = sum(finding.seconds for finding in findings)
    size = sum(finding.bytes for finding in findings)
    missing = expected - len(findings)
    whole = not missing and all(finding.complete for finding in findings)
    if not states:
        return ["Nothing was checked."]
    runs = f"{len(findings)} runs{f' of {expected}' if missing else ''}"
    return [
        f"{bound}: {states:,} states and {sum(finding.transitions for finding in findings):,} transitions in "
        f"{runs}, {'all there are' if whole else 'not all there are'};",
        f"{states / seconds:,.0f} states a second of processor time, {size / states:.0f} bytes for a state.",
        "yes: solved, in every history within this bound. ?: not all was visited, or it does not come up. -: not "
        "applicable.",
        "NO: unsolved, and `overt prove DESIGN Un` prints the shortest history.",
    ]


def story(verdict: Verdict) -> list[str]:
    """A use case, the verdict on one design, and the history that shows it."""
    claim, design = CLAIMS[verdict.use_case], DESIGNS[verdict.design]
    head = [
        f"U{verdict.use_case}, {'must' if claim.must else 'nice'}: {claim.text}",
        f"{design.title} ({design.source})",
        f"{verdict.outcome}{': ' + verdict.reason if verdict.reason else ''}",
    ]
    if verdict.history is None:
        return head
    return [*head, "", *timeline.lines(verdict.history)]


def as_json(verdicts: list[Verdict], findings: list[Finding], bound: Bound) -> dict[str, Any]:
    """Everything."""
    return {
        "bound": bound._asdict(),
        "verdicts": [_verdict(verdict) for verdict in verdicts],
        "runs": [
            {
                "design": finding.task.design,
                "scope": finding.task.scope,
                "volatile": list(finding.task.kinds),
                "states": finding.states,
                "transitions": finding.transitions,
                "depth": finding.depth,
                "complete": finding.complete,
                "seconds": round(finding.seconds, 3),
                "bytes": finding.bytes,
            }
            for finding in findings
        ],
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    claim = CLAIMS[verdict.use_case]
    found: dict[str, Any] = {
        "design": verdict.design,
        "use_case": f"U{verdict.use_case}",
        "must": claim.must,
        "outcome": verdict.outcome,
        "reason": verdict.reason,
    }
    if verdict.history is not None:
        parties = verdict.history.parties
        found["due"] = verdict.history.due
        found["history"] = [
            {"who": parties[event.party], "what": event.verb, "fd": event.fd, "errno": event.errno}
            for event in verdict.history.events
        ]
    return found
