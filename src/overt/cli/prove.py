"""``overt prove``: which design tells whom, checked over every history."""

import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from overt.prove import matrix, report
from overt.prove.claims import CLAIMS
from overt.prove.designs import DESIGNS
from overt.prove.matrix import Finding, Task
from overt.prove.scope import DEEP, DEFAULT, Bound


def read_bound(ctx: click.Context, parameter: click.Parameter, value: str) -> Bound:
    """``default``, ``deep``, or three numbers."""
    named = {"default": DEFAULT, "deep": DEEP}
    if value in named:
        return named[value]
    numbers = re.fullmatch(r"([1-4])/([1-4])/([1-4])", value)
    if numbers is None:
        raise click.BadParameter("it is default, deep, or OVERLAYS/FDS/ERRORS with 1 to 4 of each")
    return Bound(*map(int, numbers.groups()))


def read_use_case(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """``U5`` or ``5``."""
    if value is None:
        return None
    number = {str(case): case for case in CLAIMS}.get(value.removeprefix("U").removeprefix("u").lstrip("0"))
    if number is None:
        raise click.BadParameter(f"'{value}' is not one of U1 to U{max(CLAIMS)}")
    return number


@click.command("prove")
@click.argument("design", required=False, metavar="[DESIGN", type=click.Choice(list(DESIGNS)))
@click.argument("use_case", required=False, metavar="[USE-CASE]]", callback=read_use_case)
@click.option("--bound", default="default", show_default=True, metavar="BOUND", callback=read_bound,
              help="default, deep, or OVERLAYS/FDS/ERRORS: how large the world is.")  # fmt: skip
@click.option("--states", type=click.IntRange(1), metavar="N", help="Visit N states in each run at most.")
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, help="How many processes (all cores).")
@click.option("--cluster", metavar="ADDRESS", help="Run on a Dask cluster: its scheduler, or 'local'.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
def command(
    design: str | None, use_case: int | None, bound: Bound, states: int | None, jobs: int, cluster: str | None,
    as_json: bool,
) -> int:  # fmt: skip
    """Check which design tells whom, over every history.

    Without arguments: all designs, and all use cases of docs/use-cases.md. With a DESIGN: its use cases, and what was
    visited. With a USE-CASE (U5): the shortest history that breaks it, if there is one.

    Ctrl-C prints what is known so far. Exit status 0; 1 if overt breaks a use case that is a must; 130 after Ctrl-C.
    """
    designs = [design] if design else list(DESIGNS)
    todo = list(matrix.tasks(designs, bound, states))
    findings, stopped = gather(todo, jobs, cluster)
    each = len(todo) // len(designs)
    verdicts = [verdict for name in designs for verdict in matrix.verdicts(name, findings, each)]
    wanted = [verdict for verdict in verdicts if use_case in (None, verdict.use_case)]
    if as_json:
        print(json.dumps(report.as_json(wanted, findings, bound), indent=2))
    else:
        console = Console(highlight=False)
        console.width = console.width if console.is_terminal else 160
        if use_case is not None:
            console.print("\n".join(report.story(wanted[0])), markup=False, soft_wrap=True)
        else:
            console.print(report.table(verdicts))
            console.print("\n".join(report.totals(findings, bound, len(todo))), markup=False)
    if stopped:
        print("overt: stopped before all was checked", file=sys.stderr)
        return 130
    return int(any(report.breaks_a_promise(verdict) for verdict in wanted))


def gather(todo: Sequence[Task], jobs: int, cluster: str | None) -> tuple[list[Finding], bool]:
    """Check all, with progress on a terminal; what was found, in order, and whether it was stopped before the end."""
    found: list[Finding] = []
    order = {task: number for number, task in enumerate(todo)}
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    stopped = False
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(todo))
        try:
            for finding in spread(todo, jobs, cluster):
                found.append(finding)
                states = sum(one.states for one in found)
                progress.update(bar, advance=1, description=f"{finding.task.design}: {states:,} states in all")
        except KeyboardInterrupt:
            stopped = True
    return sorted(found, key=lambda finding: order[finding.task]), stopped


def spread(todo: Sequence[Task], jobs: int, cluster: str | None) -> Iterator[Finding]:
    """Check on this machine or on a cluster; the findings as they come."""
    if cluster is not None:
        yield from on_cluster(todo, cluster)
    elif jobs == 1 or len(todo) == 1:
        yield from map(matrix.check, todo)
    else:
        with multiprocessing.get_context("fork").Pool(jobs, initializer=_leave_interrupts) as pool:
            yield from pool.imap_unordered(matrix.check, todo)


def _leave_interrupts() -> None:
    """Ctrl-C is for the parent, who ends the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def on_cluster(todo: Sequence[Task], address: str) -> Iterable[Finding]:
    """The same on a Dask cluster, whose workers have overt installed."""
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise click.ClickException("--cluster needs Dask: pip install '.[cluster]' in the checkout") from None
    with Client(None if address == "local" else address) as client:
        for future in as_completed(client.map(matrix.check, todo)):
            yield future.result()
