"""The measuring rod: that it runs, that it ends, and that its arithmetic is right."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overt.bench import meter, report, rows, run, workloads
from overt.bench.sample import Reading
from overt.bench.systems import SYSTEMS


class Runs:
    """Runs of the command in a temporary directory of their own, ended with the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(self.directory)},
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def bench(self, *args: str) -> subprocess.Popen[str]:
        return self.start("-m", "overt", "bench", "--quick", *args)

    def left(self) -> list[str]:
        return os.listdir(self.directory)

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
                try:
                    process.communicate(timeout=10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()


@pytest.fixture
def runs() -> Iterator[Runs]:
    # Not tmp_path: the name of a socket in it would be too long.
    with tempfile.TemporaryDirectory(prefix="overt-") as directory:
        running = Runs(Path(directory))
        yield running
        running.end()


def results(row: str, **values: float) -> list[run.Result]:
    return [run.Result((row,), name, (Reading(row, value, 0.5),)) for name, value in values.items()]


@pytest.mark.root
@pytest.mark.timeout(60)
def test_a_short_run_measures_every_system_that_was_asked_for(runs: Runs) -> None:
    process = runs.bench("--rounds", "2", "--only", "create,syncfs", "--systems", "plain,kernel,overt", "--json")
    out, err = process.communicate(timeout=50)
    assert (process.returncode, err) == (0, "")
    printed = json.loads(out)
    assert [line["row"] for line in printed["rows"]] == ["create", "syncfs"]
    for line in printed["rows"]:
        assert set(line["systems"]) == {"plain", "kernel", "overt"}
        assert all(len(cell["samples"]) == 2 and cell["median"] > 0 for cell in line["systems"].values())
        assert set(line["ratios"]) == {"plain", "kernel"}
        assert line["systems"]["overt"]["server_cpu_seconds"] > 0
        assert line["systems"]["kernel"]["server_cpu_seconds"] == 0
    assert not runs.left()


@pytest.mark.root
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing_behind(number: signal.Signals, status: int, runs: Runs) -> None:
    process = runs.bench("--only", "rand-read", "--systems", "kernel,overt")
    deadline = time.monotonic() + 20
    while not runs.left() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    os.killpg(process.pid, number)  # as a terminal does: the server is told too
    process.communicate(timeout=40)
    assert process.returncode == status
    assert not runs.left()


@pytest.mark.root
@pytest.mark.timeout(60)
@pytest.mark.skipif(not shutil.which("fuse-overlayfs"), reason="fuse-overlayfs is not installed")
def test_a_server_that_stops_answering_fails_its_rows_and_no_others(runs: Runs) -> None:
    program = """
import os, signal, sys
from overt.bench import run, workloads
from overt.bench.sample import QUICK
run.ANSWER = 1.0
def hang(sample):
    for pid in sample.system.pids():
        os.kill(pid, signal.SIGSTOP)
    with sample.row("stat"):
        os.path.exists(sample.target / "directory")
        os.stat(sample.target / "directory")
workload = workloads.Workload(("stat",), workloads.small_layer, hang)
for result in run.run([workload], ["plain", "fuse-overlayfs"], 1, QUICK, lambda row, system: None):
    print(result.system, len(result.readings), result.error)
"""
    out, err = runs.start("-c", program).communicate(timeout=50)
    assert (out, err) == ("plain 1 None\nfuse-overlayfs 0 no answer in 1 s\n", "")
    assert not runs.left()


@pytest.mark.parametrize("option", [["--only", "creat"], ["--systems", "plain,aufs"], ["--rounds", "0"]])
def test_an_unknown_row_or_system_is_bad_usage(option: list[str], runs: Runs) -> None:
    process = runs.bench(*option)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert err.startswith("overt bench: Invalid value") and err.count("\n") == 1


def test_every_row_is_measured_by_exactly_one_workload() -> None:
    measured = [row for workload in workloads.WORKLOADS for row in workload.rows]
    assert sorted(measured) == sorted(rows.ROWS)


def test_a_ratio_says_how_many_times_better_whichever_way_the_unit_counts() -> None:
    slow = results("create", plain=5, overt=10) + results("seq-read", plain=5, overt=10)
    less, more = report.lines(slow, ["plain", "overt"], ())
    assert (less.row.name, less.ratios) == ("create", {"plain": 0.5})
    assert (more.row.name, more.ratios) == ("seq-read", {"plain": 2.0})


def test_the_median_is_taken_over_rounds() -> None:
    rounds = [result for value in (1.0, 100.0, 3.0) for result in results("create", overt=value)]
    [line] = report.lines(rounds, ["overt"], ())
    assert (line.cells["overt"].median, line.cells["overt"].cpu) == (3.0, 0.5)


@pytest.mark.parametrize(
    ("row", "values", "words"),
    [
        ("unlink", {"fuse-overlayfs": 100, "overt": 101}, ("0.99 of fuse-overlayfs, 1 is asked",)),
        ("unlink", {"fuse-overlayfs": 100, "overt": 99}, ()),
        ("rand-write", {"kernel": 100, "overt": 89}, ("0.89 of kernel, 0.9 is asked",)),
        ("rand-write", {"kernel": 100, "overt": 91}, ()),
        ("syncfs-clean", {"plain": 20, "fuse-overlayfs": 1, "overt": 319}, ()),
        ("syncfs-clean", {"plain": 20, "overt": 321}, ("301 us above plain, 300 is allowed",)),
        ("idle", {"plain": 0, "overt": 0.02}, ("0.0200 s, 0.005 is allowed",)),
        ("idle", {"plain": 0, "overt": 0}, ()),
    ],
)
def test_a_row_that_is_not_good_enough_is_marked(row: str, values: dict[str, float], words: tuple[str, ...]) -> None:
    [line] = report.lines(results(row, **values), list(values), ())
    assert line.short_of == words


def test_a_system_that_failed_is_shown_as_failed() -> None:
    failed = [*results("create", plain=5), run.Result(("create",), "overt", (), "Input/output error")]
    systems = ["plain", "overt"]
    found = report.lines(failed, systems, ())
    assert found[0].cells["overt"].error == "Input/output error"
    assert any("overt: failed: Input/output error" in remark for remark in report.remarks(found, systems))


def test_processor_time_of_another_process_is_read_and_its_end_is_an_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        assert 0.05 < meter.cpu_seconds([process.pid]) < 1
        assert meter.proportional_bytes([process.pid]) > 1 << 20
    finally:
        process.kill()
        process.wait()
    with pytest.raises(ProcessLookupError, match=f"process {process.pid} has ended"):
        meter.cpu_seconds([process.pid])


def test_the_systems_are_named_as_in_the_table_of_ratios() -> None:
    assert {peer for row in rows.ROWS.values() for peer in row.ratios} <= set(SYSTEMS)
