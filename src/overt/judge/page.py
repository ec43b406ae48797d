"""The report: one HTML page with everything in it, that asks the network for nothing.

Every cell of the matrix is a link to its history, which works without a script. The script adds filters, arrow keys
and Escape.
"""

import os
import platform
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template

from overt import __version__
from overt.judge.play import NOT_APPLICABLE, Outcome
from overt.judge.scenario import Scenario
from overt.judge.systems import System
from overt.judge.table import SIGNS
from overt.judge.timeline import draw

_CLASSES = {"holds": "holds", "violated": "violated", "unknown": "unknown", "not applicable": "na", "flaky": "flaky"}


def render(outcomes: Sequence[Outcome], scenarios: Sequence[Scenario], systems: Sequence[System]) -> str:
    """The page."""
    uppers = list(dict.fromkeys(outcome.upper for outcome in outcomes))
    text = Template(resources.files("overt.judge").joinpath("page.html").read_text("utf-8"))
    return text.substitute(
        machine=_machine(systems),
        uppers="".join(f'<label><input type="checkbox" name="upper" value="{u}" checked> {u}</label>' for u in uppers),
        matrices="".join(_matrix(upper, outcomes, scenarios) for upper in uppers),
        cells="".join(
            _cell(outcome, _of(outcome, scenarios)) for outcome in outcomes if outcome.verdict != NOT_APPLICABLE
        ),
    )


def anchor(outcome: Outcome) -> str:
    """The id of a cell's history in the page."""
    return re.sub(r"[^\w-]", "_", f"{outcome.upper}--{outcome.scenario}--{outcome.system}", flags=re.ASCII)


def _of(outcome: Outcome, scenarios: Sequence[Scenario]) -> Scenario:
    return next(scenario for scenario in scenarios if scenario.id == outcome.scenario)


def _machine(systems: Sequence[System]) -> str:
    rows = [("machine", f"{platform.machine()}, {os.cpu_count()} processors"), ("kernel", platform.release()),
            ("overt", __version__)]  # fmt: skip
    rows += [(system.name, system.missing() or system.version()) for system in systems if system.name != "overt"]
    return "".join(f"<tr><th>{escape(name)}</th><td>{escape(what)}</td></tr>" for name, what in rows)


def _matrix(upper: str, outcomes: Sequence[Outcome], scenarios: Sequence[Scenario]) -> str:
    here = [outcome for outcome in outcomes if outcome.upper == upper]
    found = {(outcome.scenario, outcome.system): outcome for outcome in here}
    systems = list(dict.fromkeys(outcome.system for outcome in here))
    head = "".join(f'<th scope="col"><span>{escape(system)}</span></th>' for system in systems)
    rows = []
    for scenario in scenarios:
        cells = "".join(_link(found.get((scenario.id, system))) for system in systems)
        title = f"{escape(scenario.id)}<small>{escape(scenario.title)}</small>"
        head_cell = f'<th scope="row">{title}</th>'
        rows.append(f'<tr data-need="{scenario.need}">{head_cell}<td class="need">{scenario.need}</td>{cells}</tr>')
    return (
        f'<section class="matrix" data-upper="{upper}"><h2>{upper}</h2><div class="scroll"><table>'
        f"<thead><tr><td></td><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _link(outcome: Outcome | None) -> str:
    if outcome is None:
        return "<td></td>"
    sign, kind = SIGNS[outcome.verdict], _CLASSES[outcome.verdict]
    about = escape(
        f"{outcome.scenario}, {outcome.system}: {outcome.verdict}" + (f": {outcome.reason}" * bool(outcome.reason))
    )
    if outcome.verdict == NOT_APPLICABLE:
        return f'<td class="{kind}" title="{about}">{sign}</td>'
    return f'<td class="{kind}"><a href="#{anchor(outcome)}" title="{about}">{sign}</a></td>'


def _cell(outcome: Outcome, scenario: Scenario) -> str:
    runs = f"<p>Runs: {escape(', '.join(outcome.runs))}.</p>" if outcome.runs else ""
    note = f"<p>{escape(scenario.note)}</p>" if scenario.note else ""
    reason = f": {escape(outcome.reason)}" if outcome.reason else ""
    return (
        f'<article id="{anchor(outcome)}" tabindex="-1"><a class="close" href="#" aria-label="close">&times;</a>'
        f"<h3>{escape(outcome.scenario)}: {escape(outcome.system)} on {escape(outcome.upper)}</h3>"
        f'<p class="verdict {_CLASSES[outcome.verdict]}"><b>{outcome.verdict}</b>{reason}</p>'
        f"<p><b>{scenario.need}:</b> {escape(scenario.claim)}</p>{note}{runs}{draw(outcome.history)}</article>"
    )
