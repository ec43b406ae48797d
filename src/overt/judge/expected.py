"""What this project knows of the systems on this kernel (expected.toml), and where a run differs from it.

The file lists, for each upper and system, the scenarios that are violated or unknown, or turned out not to be
applicable when they were played; all others hold, if the claim is about such a mount (overt.judge.play.outside).
`python -m overt.judge.expected < run.json` writes such a file from a run with --json.
"""

import json
import os
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from overt.judge.cells import Cell
from overt.judge.play import FLAKY, HOLDS, NOT_APPLICABLE, UNKNOWN, VIOLATED, Outcome, outside

_LISTED = (VIOLATED, UNKNOWN, NOT_APPLICABLE)


def load() -> dict[str, Any]:
    """The file of this package."""
    return tomllib.loads(resources.files("overt.judge").joinpath("expected.toml").read_text("utf-8"))


def kernel(release: str) -> str:
    """The part of a kernel's release that expectations are kept for: 6.18."""
    return ".".join(release.split("-")[0].split(".")[:2])


def differences(outcomes: Sequence[Outcome], played: Iterable[Cell], known: Mapping[str, Any]) -> list[str]:
    """The cells that are not as expected, in words. What is not installed, or not in the file, is not compared."""
    found = []
    apart = {(cell.scenario.id, cell.system.name, cell.upper) for cell in played if outside(*cell)}
    for outcome in outcomes:
        row = known.get(outcome.upper, {}).get(outcome.system)
        if row is None or (outcome.verdict == UNKNOWN and "not installed" in outcome.reason):
            continue
        due = next((verdict for verdict in _LISTED if outcome.scenario in row.get(verdict, ())), HOLDS)
        if (outcome.scenario, outcome.system, outcome.upper) in apart:
            due = NOT_APPLICABLE
        if outcome.verdict != due:
            cell = f"{outcome.scenario}, {outcome.system} on {outcome.upper}"
            why = f": {outcome.reason}" if outcome.reason else ""
            found.append(f"{cell}: {outcome.verdict}, expected {due}{why}")
    return found


def report(outcomes: Sequence[Outcome], played: Iterable[Cell]) -> int:
    """Print the differences on stderr; 1 if there are any."""
    known = load()
    here = kernel(os.uname().release)
    if known["kernel"] != here:
        print(f"overt judge: expectations are of Linux {known['kernel']}, and this is {here}", file=sys.stderr)
    found = differences(outcomes, played, known)
    for line in found:
        print(f"overt judge: {line}", file=sys.stderr)
    return int(bool(found))


def to_toml(cells: Sequence[Mapping[str, Any]], release: str) -> str:
    """The file that expects what a run has found."""
    lines = [f'kernel = "{kernel(release)}"']
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for cell in cells:
        if cell["verdict"] == FLAKY:
            raise ValueError(f"{cell['scenario']}, {cell['system']} on {cell['upper']} is flaky")
        row = rows.setdefault((cell["upper"], cell["system"]), {})
        was_played = bool(cell["history"])
        if cell["verdict"] in (VIOLATED, UNKNOWN) or (cell["verdict"] == NOT_APPLICABLE and was_played):
            row.setdefault(cell["verdict"], []).append(cell["scenario"])
    for (upper, system), row in rows.items():
        lines += ["", f'[{upper}."{system}"]']
        for verdict, scenarios in row.items():
            lines += [
                f"{json.dumps(verdict) if ' ' in verdict else verdict} = [",
                *(f'  "{scenario}",' for scenario in scenarios),
                "]",
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(to_toml(json.load(sys.stdin), os.uname().release))
