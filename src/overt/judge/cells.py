"""All cells of a run: which there are, and the process that has them played, a few at a time, each with a deadline.

Three generations keep a run from leaving anything behind. The command's own process has the terminal. Its worker
(overt.lab.worker) oversees, and outlives nobody: it is told to stop when the command ends, however that ends. Each cell
is a process of its own with its own mount namespace, which tidies up when it is told to stop, and the overseer becomes
the parent of whatever a dead cell leaves, and ends it. Disks end with the cell that made them (overt.lab.keeper).
"""

import errno
import json
import os
import select
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import NamedTuple

from overt.host import process
from overt.judge.play import FLAKY, NOT_APPLICABLE, UNKNOWN, Call, Outcome, outside, play
from overt.judge.scenario import Scenario
from overt.judge.systems import System
from overt.lab.keeper import NAME as LAB
from overt.lab.worker import Stopped, working

DEADLINE = 120.0  # seconds for one cell
EACH_MORE = 0.2  # and so many for each container
_GRACE = 20.0  # to tidy up
_KEEPERS = 45.0  # for disks to end by themselves
_SEPARATORS = ",:\\"
"""what a path in options of mount cannot have"""


class Cell(NamedTuple):
    scenario: Scenario
    system: System
    upper: str

    @property
    def deadline(self) -> float:
        return DEADLINE + EACH_MORE * self.scenario.containers


def cells(scenarios: Sequence[Scenario], systems: Sequence[System], uppers: Sequence[str]) -> list[Cell]:
    """In the order in which they are played."""
    return [Cell(scenario, system, upper) for upper in uppers for scenario in scenarios for system in systems]


def judge(todo: Sequence[Cell], runs: int, jobs: int) -> AbstractContextManager[Iterator[Outcome]]:
    """Iterate over the outcome of each cell, as they come. OSError when the run cannot go on."""
    return working(lambda send: _Overseer(todo, runs, jobs, send).run())


class _Running(NamedTuple):
    cell: Cell
    number: int
    """of the cell"""
    pid: int
    answer: int
    """the pipe on which the outcome comes"""
    until: float


class _Overseer:
    def __init__(self, todo: Sequence[Cell], runs: int, jobs: int, send: Callable[[object], None]) -> None:
        self._todo = [(number, cell) for number, cell in enumerate(todo) for _ in range(runs)]
        self._runs = runs
        self._jobs = jobs
        self._send = send
        self._running: dict[int, _Running] = {}
        self._outcomes: dict[int, list[Outcome]] = {}
        self._orphans: dict[int, float] = {}

    def run(self) -> None:
        process.adopt_orphans()
        scratch = tempfile.gettempdir()
        if set(scratch) & set(_SEPARATORS):
            raise OSError(errno.EINVAL, f"no options of mount can name a directory with any of {_SEPARATORS}", scratch)
        self._base = tempfile.mkdtemp(prefix="overt-judge-")
        try:
            self._todo.reverse()
            while self._todo or self._running:
                while self._todo and len(self._running) < self._jobs:
                    self._begin(*self._todo.pop())
                self._wait()
        finally:
            self._stop()
            os.rmdir(self._base)

    def _begin(self, number: int, cell: Cell) -> None:
        why = outside(*cell)
        absent = None if why else cell.system.missing()
        if why or absent:
            verdict = NOT_APPLICABLE if why else UNKNOWN
            self._ended(number, Outcome(cell.scenario.id, cell.system.name, cell.upper, verdict, why or absent or ""))
            return
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            _play(cell, self._base, send)
        os.close(send)
        self._running[receive] = _Running(cell, number, pid, receive, time.monotonic() + cell.deadline)

    def _wait(self) -> None:
        if not self._running:
            return
        soonest = min(running.until for running in self._running.values())
        ready, _, _ = select.select(list(self._running), [], [], max(0.0, min(1.0, soonest - time.monotonic())))
        for fd in ready:
            running = self._running.pop(fd)
            self._ended(running.number, _received(running))
            os.waitpid(running.pid, 0)
        for running in [late for late in self._running.values() if time.monotonic() > late.until]:
            del self._running[running.answer]
            self._put_down(running)
            os.close(running.answer)
            why = f"it did not end in {running.cell.deadline:.0f} s"
            cell = running.cell
            self._ended(running.number, Outcome(cell.scenario.id, cell.system.name, cell.upper, UNKNOWN, why))
        self._see_to_orphans(_GRACE)

    def _ended(self, number: int, outcome: Outcome) -> None:
        outcomes = self._outcomes.setdefault(number, [])
        outcomes.append(outcome)
        if len(outcomes) == self._runs:
            self._send(merge(outcomes))

    def _put_down(self, running: _Running) -> None:
        """End a cell that does not: first those for whom it may wait."""
        for pid in _descendants(running.pid):
            if _name(pid) != LAB:
                _signal(pid, signal.SIGKILL)
        _signal(running.pid, signal.SIGTERM)
        if not _reaped(running.pid, _GRACE):
            _signal(running.pid, signal.SIGKILL)
            _reaped(running.pid, _GRACE)

    def _see_to_orphans(self, grace: float) -> None:
        """Reap what dead cells have left, and kill what does not end; disks' keepers know best when they are done."""
        alive = set(process.children()) - {running.pid for running in self._running.values()}
        now = time.monotonic()
        for pid in alive:
            since = self._orphans.setdefault(pid, now)
            with suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == pid:
                    continue
            if now - since > (_KEEPERS if _name(pid) == LAB else grace):
                _signal(pid, signal.SIGKILL)
        self._orphans = {pid: since for pid, since in self._orphans.items() if pid in alive}

    def _stop(self) -> None:
        """Nothing stays: cells tidy up, or are put down; what they leave is ended."""
        for running in self._running.values():
            _signal(running.pid, signal.SIGTERM)
        for running in self._running.values():
            if not _reaped(running.pid, _GRACE):
                self._put_down(running)
            os.close(running.answer)
        self._running.clear()
        deadline = time.monotonic() + _KEEPERS + _GRACE
        while process.children() and time.monotonic() < deadline:
            self._see_to_orphans(1.0)
            time.sleep(0.02)


def merge(outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome of several runs of a cell: flaky if they differ, with the history of one that does not hold."""
    if len(outcomes) == 1:
        return outcomes[0]
    verdicts = tuple(outcome.verdict for outcome in outcomes)
    shown = next((outcome for outcome in outcomes if outcome.verdict != "holds"), outcomes[0])
    if len(set(verdicts)) > 1:
        counts = ", ".join(f"{verdict} {verdicts.count(verdict)}" for verdict in dict.fromkeys(verdicts))
        shown = shown._replace(verdict=FLAKY, reason=f"{counts} of {len(verdicts)}; {shown.reason}")
    return shown._replace(runs=verdicts)


def _play(cell: Cell, base: str, answer: int) -> None:
    """In the cell's process. It is told to stop by SIGTERM (overt.lab.worker), and when the overseer dies."""
    try:
        process.die_with_parent(signal.SIGTERM)
        outcome = play(cell.scenario, cell.system, cell.upper, base)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with open(answer, "w", encoding="utf-8") as file:
            json.dump(outcome, file)
    except (Stopped, BrokenPipeError):
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _received(running: _Running) -> Outcome:
    with open(running.answer, encoding="utf-8") as file:
        text = file.read()
    if not text:
        cell = running.cell
        return Outcome(cell.scenario.id, cell.system.name, cell.upper, UNKNOWN, "its process died")
    outcome = Outcome(*json.loads(text))
    return outcome._replace(history=tuple(Call(*call) for call in outcome.history), runs=tuple(outcome.runs))


def _descendants(pid: int) -> list[int]:
    found = process.children(pid)
    for child in list(found):
        found += _descendants(child)
    return found


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _reaped(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
