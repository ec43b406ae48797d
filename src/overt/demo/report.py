"""What the demo shows: a progress bar, one table, three sentences, the exit status; or JSON.

Exit status: KEPT, BROKEN (overt did not keep its promise), VOID (nothing was shown: there was no error to be told of,
or a system could not be put through the scenario), REHEARSED (this machine does not allow a disk that fails), BLIND
(this kernel does not let overt be shown).
"""

import json
import sys
from collections.abc import Iterator

from rich.box import MINIMAL
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from overt.demo import scenario
from overt.demo.perform import Begin, Lacking, Message
from overt.demo.scenario import Counts, Row

KEPT, BROKEN, VOID, REHEARSED, BLIND = 0, 1, 3, 4, 5

QUESTIONS = {
    "new_fd": "syncfs\nnew fd",
    "old_fd": "syncfs\nold fd",
    "fsync": "fsync\nown file",
    "victim_fsync": "fsync\nlost file",
}


OURS = ("overt", "overt guard")


def promise(mount: str, count: int) -> dict[str, Counts]:
    """Whom overt has promised to tell, of `count` containers: an answer to each of QUESTIONS."""
    if mount == "volatile":
        return {"new_fd": (count, count), "old_fd": (count, count), "fsync": (count, count), "victim_fsync": (1, 1)}
    return {"new_fd": (count, 0), "old_fd": (count, 0), "fsync": (0, 0), "victim_fsync": (1, 0)}


def broken(row: Row) -> list[str]:
    """Where the row is not what overt has promised, in words."""
    if row.outcome == "failed":
        return [f"{_name(row)}: {row.note}"]
    if row.outcome != "asked":
        return []
    found = [] if row.note is None else [f"{_name(row)}: {row.note}"]
    for question, due in promise(row.mount, row.containers).items():
        told = getattr(row, question)
        if told != due:
            found.append(f"{_name(row)}, {question}: told {told[0]} and {told[1]}, due {due[0]} and {due[1]}")
    return found


def _name(row: Row) -> str:
    return row.mount if row.system == "overt" else row.system


def status(rows: list[Row]) -> int:
    """The exit status: see above."""
    ours = [row for row in rows if row.system == "overt"]
    if any(broken(row) for row in rows if row.system in OURS):
        return BROKEN
    if any(row.outcome in ("void", "failed") for row in rows):
        return VOID
    if any(row.outcome == "blind" for row in ours):
        return BLIND
    return KEPT if ours and all(row.outcome == "asked" for row in ours) else REHEARSED


def to_json(rows: list[Row]) -> str:
    return json.dumps([row._asdict() for row in rows], indent=2)


def watch(messages: Iterator[Message]) -> list[Row]:
    """Show how far it is, on stderr if that is a terminal, until all rows are there."""
    rows: list[Row] = []
    console = Console(stderr=True)
    what = TextColumn("{task.description}", table_column=Column(width=45, no_wrap=True))
    columns = (what, BarColumn(bar_width=None), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        name = ""
        for message in messages:
            match message:
                case Begin():
                    name = f"{message.system}, {message.mount}"
                    bar.update(task, completed=message.done, total=message.total, description=name)
                case scenario.Progress():
                    bar.update(task, advance=message.steps, description=f"{name}: {message.stage}")
                case Row():
                    rows.append(message)
                case Lacking():
                    print(
                        f"overt demo: missing here: {message.what}; overlays are mounted and containers started, "
                        "but no error can be made, so nobody is asked",
                        file=sys.stderr,
                    )
    return rows


def show(rows: list[Row], filesystem: str) -> None:
    """Print the table, and what it means."""
    console = Console(highlight=False)
    count = rows[0].containers
    what = f"One lost write: containers told, of {count} on {filesystem}, at the first and second call"
    if all(row.outcome != "asked" for row in rows):
        what = f"Overlays of {count} containers, none of which was asked"
    console.print(what, style="bold")
    console.print()
    console.print(_table(rows))
    for note in dict.fromkeys(f"{row.system}, {row.mount}: {row.note}" for row in rows if row.note):
        console.print(note, style="yellow", markup=False)
    console.print()
    for sentence in sentences(rows):
        console.print(sentence, markup=False)


def sentences(rows: list[Row]) -> list[str]:
    """What the table means."""
    asked = [row for row in rows if row.outcome == "asked"]
    if not asked:
        return []
    told: dict[str, list[str]] = {}
    for row in asked:
        if row.new_fd and row.system not in OURS:
            told.setdefault(row.system, []).append(f"{row.new_fd[0]} on {row.mount} mounts")
    others = "; ".join(f"{system} told {' and '.join(counts)}" for system, counts in told.items())
    found = [
        "The disk refused one write of the first container, after write(2) had returned: that data is lost, and a "
        "descriptor of the plain upper, which belongs to none of these systems, was told so.",
        f"When each of {asked[0].containers} containers asked by syncfs(2) on a new descriptor, "
        f"{others or 'there was only overt to tell'}; whoever was not told was answered 0, which says that all data is "
        "safe.",
    ]
    return [*found, _verdict(rows)]


def _verdict(rows: list[Row]) -> str:
    faults = [fault for row in rows if row.system in OURS for fault in broken(row)]
    if faults:
        return f"overt did not keep its promise: {'; '.join(faults)}."
    blind = [str(row.note) for row in rows if row.system == "overt" and row.outcome == "blind"]
    if blind:
        return f"Whether overt keeps its promise cannot be shown here: {blind[0]}."
    if any(row.system == "overt" and row.outcome != "asked" for row in rows):
        return "Whether overt keeps its promise was not shown."
    guarded = any(row.system == "overt guard" and row.outcome == "asked" for row in rows)
    return (
        "overt told every container: on an ordinary mount once on each descriptor, whoever else had been told before, "
        "and by fsync only the one whose file it was; on a volatile mount at every call, for ever."
        + guarded
        * " So did the guard, on the kernel's own overlayfs."
    )


def _table(rows: list[Row]) -> Table:
    table = Table(box=MINIMAL, show_edge=False, padding=0)
    table.add_column("system")
    table.add_column("mount")
    for heading in QUESTIONS.values():
        table.add_column(heading, justify="right")
    table.add_column("mount\ntime", justify="right")
    table.add_column("server\nmemory", justify="right")
    for row in rows:
        due = promise(row.mount, row.containers)
        told = [
            _told(getattr(row, question), due[question], 1 if question == "victim_fsync" else row.containers)
            for question in QUESTIONS
        ]
        table.add_row(row.system, row.mount, *told, _seconds(row.mount_seconds), _mebibytes(row.server_rss_bytes))
    return table


def _told(told: Counts | None, due: Counts, of: int) -> Text:
    if told is None:
        return Text("-")
    digits = len(str(of))
    return Text(f"{told[0]:{digits}} {told[1]:{digits}}", style="green" if told == due else "red")


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.{2 if seconds < 10 else 1}f} s"


def _mebibytes(size: int | None) -> str:
    return "-" if not size else f"{size / (1 << 20):.0f} MiB"
