"""``overt judge``: the use cases on real filesystems with real faults."""

import json
import os
from pathlib import Path

import click

from overt.cli.report import complain
from overt.judge.play import Outcome
from overt.judge.uppers import UPPERS

_DEFAULT = "ext4"
_INTERRUPTED = 130
_HELP = """Find out whom each overlay filesystem tells of lost writes.

Every scenario (a use case of docs/judge.md, or a FILE of your own) is played with every system on every upper, each
time on a fresh disk that really fails. Cells: yes (the claim holds), NO (violated), ? (unknown), - (not applicable).

\b
Exit status:
  0  every must that was asked of overt holds
  1  one does not; or, with --check, a cell is not what is expected; or the run could not go on
  2  bad usage
  3  unknown: it could not be found out for overt
  130  interrupted (Ctrl-C): what is known so far was printed
"""


def split(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> list[str]:
    """Words with commas between them, or the option repeated."""
    words = list(dict.fromkeys(word.strip() for text in value for word in text.split(",") if word.strip()))
    if value and not words:
        raise click.BadParameter("it names nothing")
    return words


@click.command("judge", help=_HELP)
@click.argument("files", nargs=-1, metavar="[FILE]...", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--fs", "uppers", multiple=True, default=[_DEFAULT], show_default=True, callback=split,
              metavar="NAMES", help=f"Uppers: {', '.join(UPPERS)}.")  # fmt: skip
@click.option("--only", multiple=True, metavar="CASES", callback=split, help="Only these use cases: U5,U13-durable.")
@click.option("--systems", "names", multiple=True, metavar="NAMES", callback=split, help="Only these systems.")
@click.option("--system", "commands", multiple=True, metavar="CMD",
              help="One more: 'CMD -o lowerdir={lower},upperdir={upper},workdir={work} {mount}'.")  # fmt: skip
@click.option("--volatile-system", "volatiles", multiple=True, metavar="CMD", help="One more, whose mount is volatile.")
@click.option("--containers", type=click.IntRange(1), default=None, help="So many, where a scenario can have more.")
@click.option("--runs", type=click.IntRange(1), default=1, show_default=True, help="Play each cell so often.")
@click.option("--jobs", type=click.IntRange(1), default=min(2, os.cpu_count() or 1), show_default=True,
              help="Cells played at once.")  # fmt: skip
@click.option("--check", is_flag=True, help="Compare with what is expected of this kernel and these systems.")
@click.option("--why", is_flag=True, help="Print the history of each cell that does not hold.")
@click.option("--list", "just_list", is_flag=True, help="List scenarios and systems, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print a list with an object for each cell, and no table.")
@click.option("--html", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write a report.")
def command(
    files: tuple[Path, ...], uppers: list[str], only: list[str], names: list[str], commands: tuple[str, ...],
    volatiles: tuple[str, ...], containers: int | None, runs: int, jobs: int, check: bool, why: bool, just_list: bool,
    as_json: bool, html: Path | None,
) -> int:  # fmt: skip
    from rich.console import Console

    from overt.judge import expected, page, table
    from overt.judge.cells import cells, judge
    from overt.judge.choice import choose, choose_systems

    try:
        scenarios = choose(files, only, containers)
        systems = choose_systems(names, commands, volatiles)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    for upper in uppers:
        if upper not in UPPERS:
            raise click.BadParameter(f"'{upper}' is not one of {', '.join(UPPERS)}", param_hint="'--fs'")
    if html is not None and not html.exists() and not os.access(html.parent, os.W_OK | os.X_OK):
        raise click.BadParameter(f"'{html}' cannot be made: no such directory, or not writable", param_hint="'--html'")
    out = Console(highlight=False)
    out.width = out.width if out.is_terminal else 200  # a table in a pipe has the width that it needs
    if just_list:
        table.show_choice(scenarios, systems, out)
        return 0
    if os.geteuid() != 0:
        raise click.ClickException("judge needs root, to attach loop devices and to mount")
    todo = cells(scenarios, systems, uppers)
    outcomes: list[Outcome] = []
    interrupted = False
    try:
        with judge(todo, runs, jobs) as arriving:
            table.watch(arriving, len(todo), outcomes)
    except KeyboardInterrupt:
        interrupted = True
    order = {(cell.scenario.id, cell.system.name, cell.upper): number for number, cell in enumerate(todo)}
    outcomes.sort(key=lambda outcome: order[outcome.scenario, outcome.system, outcome.upper])
    if as_json:
        print(json.dumps([outcome.as_json() for outcome in outcomes], indent=1))
    else:
        table.show(outcomes, scenarios, out)
        if why:
            table.counterexamples(outcomes, out)
    if html:
        html.write_text(page.render(outcomes, scenarios, systems), "utf-8")
    if interrupted:
        complain("overt judge", f"interrupted: {len(outcomes)} of {len(todo)} cells were played")
        return _INTERRUPTED
    if check:
        return expected.report(outcomes, todo)
    return table.status(outcomes, scenarios)
