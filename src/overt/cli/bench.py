"""``overt bench``: overt beside the other overlays, in one interleaved run."""

import contextlib
import json
import os
import sys

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from overt.bench import report, tools
from overt.bench.rows import ROWS
from overt.bench.run import Result, choose, run, steps
from overt.bench.sample import FULL, QUICK
from overt.bench.systems import SYSTEMS


def split(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Names given in one word with commas, or the option repeated; each must be known."""
    known = SYSTEMS if parameter.name == "systems" else ROWS
    names = tuple(dict.fromkeys(name for word in value for name in word.split(",")))
    for name in names:
        if name not in known:
            raise click.BadParameter(f"'{name}' is not one of {', '.join(known)}")
    return names


@click.command("bench")
@click.option("--quick", is_flag=True, help="Smaller trees and files: about a minute and a half.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="How often all is measured.")
@click.option("--only", multiple=True, metavar="ROW", callback=split, help="Only these rows (repeat, or use commas).")
@click.option("--systems", multiple=True, metavar="NAMES", callback=split, help=f"Of {', '.join(SYSTEMS)}.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON instead of the table.")
def command(quick: bool, rounds: int, only: tuple[str, ...], systems: tuple[str, ...], as_json: bool) -> int:
    """Measure overt beside the plain filesystem, kernel overlayfs and fuse-overlayfs.

    Everything happens on a filesystem in memory, in a mount namespace of its own. Needs root, and 6 GiB of free
    memory (1.2 GiB with --quick). Exit status 0 even if overt is slow: the table marks the rows that are.
    """
    if os.geteuid() != 0:
        raise click.ClickException("bench needs root, to mount and to attach a loop device")
    chosen = [name for name in systems or SYSTEMS if _usable(SYSTEMS[name].command, name)]
    workloads = [workload for workload in choose(only) if _usable(workload.command, ", ".join(workload.rows))]
    if not chosen or not workloads:
        raise click.ClickException("nothing is left to measure")
    results: list[Result] = []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=steps(workloads, chosen, rounds))

        def about_to(row: str, system: str) -> None:
            progress.update(task, advance=1, description=f"{row}: {system}")

        samples = run(workloads, chosen, rounds, QUICK if quick else FULL, about_to)
        # Closed, so that an interrupt that arrives here unmounts there.
        with contextlib.closing(samples):
            results.extend(samples)
    lines = report.lines(results, chosen, only)
    if as_json:
        print(json.dumps(report.as_json(lines, chosen, rounds, quick), indent=2))
    else:
        out = Console()
        # A table in a pipe has the width that it needs.
        out.width = out.width if out.is_terminal else 200
        out.print(report.table(lines, chosen))
        for remark in report.remarks(lines, chosen):
            out.print(remark, highlight=False, markup=False)
    return int(any(result.error for result in results))


def _usable(program: str | None, what: str) -> bool:
    """Whether `program` is there; if not, say what is left out."""
    if program is None or tools.installed(program):
        return True
    print(f"overt: {what}: left out, {program} is not installed", file=sys.stderr)
    return False
