"""From readings to medians, ratios and marks; as a table and as JSON."""

import math
import os
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from overt.bench.rows import ROWS, Row
from overt.bench.run import Result
from overt.bench.systems import SYSTEMS

UNITS = {"us": "µs"}


class Cell(NamedTuple):
    """One system in one row."""

    samples: tuple[float, ...]
    cpu: float
    """Processor time of its servers during one sample, in seconds: the median."""
    error: str | None

    @property
    def median(self) -> float | None:
        """In the row's unit; None if there is no sample."""
        return statistics.median(self.samples) if self.samples else None


class Line(NamedTuple):
    """One row with its cells, by system, and what follows from them for the subject."""

    row: Row
    cells: dict[str, Cell]
    ratios: dict[str, float]
    """How many times better the subject is than each other system."""
    short_of: tuple[str, ...]
    """What is not good enough, in words."""


def subject_of(systems: Sequence[str]) -> str:
    """The system that the others are compared with."""
    return "overt" if "overt" in systems else systems[-1]


def lines(results: Iterable[Result], systems: Sequence[str], only: Sequence[str]) -> list[Line]:
    """The table's lines, in the order of ROWS, for the rows in `only` (all measured ones if there are none)."""
    samples: dict[tuple[str, str], list[tuple[float, float]]] = {}
    errors: dict[tuple[str, str], str] = {}
    for result in results:
        for reading in result.readings:
            samples.setdefault((reading.row, result.system), []).append((reading.value, reading.cpu))
        if result.error:
            for name in result.rows:
                errors[name, result.system] = result.error
    found = []
    for row in ROWS.values():
        if only and row.name not in only:
            continue
        cells = {}
        for system in systems:
            taken, error = samples.get((row.name, system), []), errors.get((row.name, system))
            if taken or error:
                cpu = statistics.median(cpu for _, cpu in taken) if taken else 0.0
                cells[system] = Cell(tuple(value for value, _ in taken), cpu, error)
        if cells:
            found.append(_line(row, cells, subject_of(systems)))
    return found


def _line(row: Row, cells: dict[str, Cell], subject: str) -> Line:
    own = cells[subject].median if subject in cells else None
    ratios = {}
    short_of = []
    for peer, cell in cells.items():
        other = cell.median
        if peer == subject or not own or not other:
            continue
        ratios[peer] = own / other if row.more_is_better else other / own
        least = row.ratios.get(peer)
        if least is not None and ratios[peer] < least:
            short_of.append(f"{ratios[peer]:.2f} of {peer}, {least:g} is asked")
        if peer == "plain" and row.above_plain is not None and own - other > row.above_plain:
            short_of.append(f"{number(own - other)} {row.unit} above plain, {row.above_plain:g} is allowed")
    if row.most is not None and own is not None and own > row.most:
        short_of.append(f"{number(own)} {row.unit}, {row.most:g} is allowed")
    return Line(row, cells, ratios, tuple(short_of))


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 6)}f}"


def table(found: Sequence[Line], systems: Sequence[str]) -> Table:
    """For people: medians, the servers' processor seconds beside them, and ratios."""
    subject = subject_of(systems)
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.add_column("")
    drawn.add_column("")
    for system in systems:
        drawn.add_column(system, justify="right")
        if SYSTEMS[system].serves:
            drawn.add_column("CPU s", justify="right", style="dim")
    for system in systems:
        if system != subject:
            drawn.add_column(f"vs {system}", justify="right")
    drawn.add_column("")
    for line in found:
        cells: list[str | Text] = [line.row.title, UNITS.get(line.row.unit, line.row.unit)]
        for system in systems:
            cell = line.cells.get(system)
            median = cell.median if cell else None
            if cell and cell.error:
                cells.append(Text("failed", "bold red"))
            else:
                cells.append("-" if median is None else number(median))
            if SYSTEMS[system].serves:
                cells.append(f"{cell.cpu:.2f}" if cell and not cell.error else "")
        for system in systems:
            if system != subject:
                ratio = line.ratios.get(system)
                cells.append("-" if ratio is None else Text(f"{ratio:.2f}", "red" if ratio < 1 else "green"))
        cells.append(Text("<", "bold red") if line.short_of else "")
        drawn.add_row(*cells)
    return drawn


def remarks(found: Sequence[Line], systems: Sequence[str]) -> list[str]:
    """What has to be said beneath the table, a sentence each."""
    subject = subject_of(systems)
    said = [f"Medians; ratios say how many times better {subject} is (below 1: worse). CPU s: of its servers."]
    for line in found:
        said += [f"< {line.row.title}: {words}." for words in line.short_of]
    for line in found:
        said += [f"{line.row.title}, {name}: failed: {cell.error}" for name, cell in line.cells.items() if cell.error]
    said += [f"{line.row.title}: {line.row.note}." for line in found if line.row.note]
    return said


def as_json(found: Sequence[Line], systems: Sequence[str], rounds: int, quick: bool) -> dict[str, Any]:
    """For programs: everything, the single samples too."""
    return {
        "kernel": os.uname().release,
        "cpus": os.cpu_count(),
        "systems": list(systems),
        "subject": subject_of(systems),
        "rounds": rounds,
        "quick": quick,
        "rows": [
            {
                "row": line.row.name,
                "title": line.row.title,
                "unit": line.row.unit,
                "better": "more" if line.row.more_is_better else "less",
                "systems": {
                    name: {
                        "median": cell.median,
                        "samples": list(cell.samples),
                        "server_cpu_seconds": cell.cpu,
                        "error": cell.error,
                    }
                    for name, cell in line.cells.items()
                },
                "ratios": line.ratios,
                "short_of": list(line.short_of),
            }
            for line in found
        ],
    }
