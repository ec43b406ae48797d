"""What the terminal shows: one table for each upper, a row for each scenario and a column for each system."""

from collections.abc import Iterator, Sequence

from rich.box import MINIMAL
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from overt.judge.play import FLAKY, HOLDS, NOT_APPLICABLE, UNKNOWN, VIOLATED, Outcome
from overt.judge.scenario import Scenario
from overt.judge.systems import System

SIGNS = {HOLDS: "yes", VIOLATED: "NO", UNKNOWN: "?", NOT_APPLICABLE: "-", FLAKY: "flaky"}
_STYLES = {HOLDS: "green", VIOLATED: "bold red", UNKNOWN: "yellow", NOT_APPLICABLE: "dim", FLAKY: "bold yellow"}

KEPT, BROKEN, UNSURE = 0, 1, 3


def status(outcomes: Sequence[Outcome], scenarios: Sequence[Scenario]) -> int:
    """The exit status: BROKEN if overt breaks a `must` somewhere, UNSURE if that cannot be said, else KEPT."""
    musts = {scenario.id for scenario in scenarios if scenario.need == "must"}
    ours = [outcome for outcome in outcomes if is_ours(outcome.system) and outcome.scenario in musts]
    verdicts = {verdict for outcome in ours for verdict in (outcome.verdict, *outcome.runs)}
    if VIOLATED in verdicts:
        return BROKEN
    return UNSURE if verdicts & {UNKNOWN, FLAKY} else KEPT


def is_ours(system: str) -> bool:
    return system.split()[0] == "overt"


def show(outcomes: Sequence[Outcome], scenarios: Sequence[Scenario], console: Console) -> None:
    """Print the tables, and why a cell is unknown or flaky."""
    for upper in dict.fromkeys(outcome.upper for outcome in outcomes):
        here = [outcome for outcome in outcomes if outcome.upper == upper]
        console.print(f"upper: {upper}", style="bold")
        console.print(_table(here, scenarios))
        reasons: dict[str, list[str]] = {}
        for outcome in here:
            if outcome.verdict in (UNKNOWN, FLAKY):
                reasons.setdefault(f"{outcome.system}: {outcome.reason}", []).append(outcome.scenario)
        for reason, ids in reasons.items():
            which = ", ".join(ids) if len(ids) < 6 else f"{len(ids)} scenarios"
            console.print(f"? {reason} ({which})", style="yellow", markup=False, highlight=False)


def _table(outcomes: Sequence[Outcome], scenarios: Sequence[Scenario]) -> Table:
    table = Table(box=MINIMAL, pad_edge=False, padding=(0, 0, 0, 0))
    table.add_column("use case", no_wrap=True)
    table.add_column("", no_wrap=True)
    systems = list(dict.fromkeys(outcome.system for outcome in outcomes))
    for system in systems:
        table.add_column(system.replace(" ", "\n").replace("-", "-\n"), justify="center", no_wrap=True)
    found = {(outcome.scenario, outcome.system): outcome.verdict for outcome in outcomes}
    for scenario in scenarios:
        cells = []
        for system in systems:
            verdict = found.get((scenario.id, system))  # none: interrupted before it was played
            cells.append(Text(SIGNS[verdict], style=_STYLES[verdict]) if verdict else Text())
        table.add_row(scenario.id, Text(scenario.need, style="" if scenario.need == "must" else "dim"), *cells)
    return table


def counterexamples(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print the history of each cell that does not hold."""
    for outcome in outcomes:
        if outcome.verdict in (HOLDS, NOT_APPLICABLE):
            continue
        head = f"{outcome.scenario}, {outcome.system} on {outcome.upper}: {outcome.verdict}"
        console.print(f"\n{head}: {outcome.reason}", style="bold", markup=False, highlight=False)
        for call in outcome.history:
            mark = " " if call.fits else "!"
            due = f"  (due {call.due})" if call.due else ""
            disk = f"  [{call.disk}]" if call.disk else ""
            line = f"{mark}{call.at:8.3f}  {call.who:5} {call.call} -> {call.answer}{due}{disk}"
            console.print(line, markup=False, highlight=False)


def watch(arriving: Iterator[Outcome], total: int, outcomes: list[Outcome]) -> None:
    """Show how far it is, on stderr if that is a terminal, until all outcomes are in `outcomes`."""
    console = Console(stderr=True)
    what = TextColumn("{task.description}", table_column=Column(width=50, no_wrap=True))
    columns = (what, BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        for outcome in arriving:
            outcomes.append(outcome)
            what_now = f"{outcome.upper}: {outcome.scenario}: {outcome.system}"
            bar.update(task, advance=1, description=what_now)


def show_choice(scenarios: Sequence[Scenario], systems: Sequence[System], console: Console) -> None:
    """Print what could be judged."""
    for scenario in scenarios:
        console.print(f"{scenario.id:28} {scenario.need:5} {scenario.title}", markup=False)
    console.print()
    for system in systems:
        console.print(f"{system.name:28} {system.kind:9} {system.missing() or system.version()}", markup=False)
