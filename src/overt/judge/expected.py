"""What this project knows of the systems on this kernel (expected.toml), and where a run differs from it.

The file lists, for each upper and system, the scenarios that are violated or unknown; all others hold, or are not
applicable. `python -m overt.judge.expected < run.json` writes such a file from a run with --json.
"""

import json
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from overt.judge.play import FLAKY, HOLDS, NOT_APPLICABLE, UNKNOWN, VIOLATED, Outcome

_FINE = (HOLDS, NOT_APPLICABLE)


def load() -> dict[str, Any]:
    """The file of this package."""
    return tomllib.loads(resources.files("overt.judge").joinpath("expected.toml").read_text())


def kernel(release: str) -> str:
    """The part of a kernel's release that expectations are kept for: 6.18."""
    return ".".join(release.split("-")[0].split(".")[:2])


def differences(outcomes: Sequence[Outcome], known: Mapping[str, Any]) -> list[str]:
    """The cells that are not as expected, in words. What is not installed, or not in the file, is not compared."""
    found = []
    for outcome in outcomes:
        row = known.get(outcome.upper, {}).get(outcome.system)
        if row is None or (outcome.verdict == UNKNOWN and "not installed" in outcome.reason):
            continue
        due = next((verdict for verdict in (VIOLATED, UNKNOWN) if outcome.scenario in row.get(verdict, ())), None)
        if outcome.verdict != due and not (due is None and outcome.verdict in _FINE):
            cell = f"{outcome.scenario}, {outcome.system} on {outcome.upper}"
            why = f": {outcome.reason}" if outcome.reason else ""
            found.append(f"{cell}: {outcome.verdict}, expected {due or HOLDS}{why}")
    return found


def report(outcomes: Sequence[Outcome]) -> int:
    """Print the differences on stderr; 1 if there are any."""
    known = load()
    here = kernel(os.uname().release)
    if known["kernel"] != here:
        print(f"overt judge: expectations are of Linux {known['kernel']}, and this is {here}", file=sys.stderr)
    found = differences(outcomes, known)
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
        if cell["verdict"] not in _FINE:
            row.setdefault(cell["verdict"], []).append(cell["scenario"])
    for (upper, system), row in rows.items():
        lines += ["", f'[{upper}."{system}"]']
        for verdict, scenarios in row.items():
            lines += [f"{verdict} = [", *(f'  "{scenario}",' for scenario in scenarios), "]"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(to_toml(json.load(sys.stdin), os.uname().release))
