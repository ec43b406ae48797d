"""The command: a cluster gives the same verdicts, and Ctrl-C prints what is known so far."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from overt.cli.prove import gather
from overt.prove import matrix
from overt.prove.designs import DESIGNS
from overt.prove.scope import Bound

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.mark.timeout(180)
@pytest.mark.filterwarnings("default")
def test_a_cluster_gives_the_same_verdicts() -> None:
    pytest.importorskip("distributed")
    todo = list(matrix.tasks(["mainline", "overt"], Bound(2, 1, 1)))
    here, there = gather(todo, 1, None)[0], gather(todo, 1, "local")[0]
    for design in ("mainline", "overt"):
        assert matrix.verdicts(design, here) == matrix.verdicts(design, there)
    assert [finding.states for finding in here] == [finding.states for finding in there]


def test_without_dask_it_is_said_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(click.ClickException, match=r"pip install '\.\[cluster\]' in the checkout"):
        gather([], 1, "local")


@pytest.mark.timeout(120)
def test_ctrl_c_prints_what_is_known_so_far() -> None:
    command = [sys.executable, "-m", "overt", "prove", "mainline", "--bound", "deep", "--jobs", "2"]
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 60
        while len(workers.read_text().split()) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped before all was checked" in err
    assert "U5" in out


@pytest.mark.timeout(120)
def test_progress_is_shown_on_a_terminal_only() -> None:
    command = [sys.executable, "-m", "overt", "prove", "mainline", "U5", "--bound", "1/1/1", "--jobs", "1"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "TERM": "xterm"}
    quiet = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert quiet.stderr == ""
    ours, theirs = pty.openpty()
    try:
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=theirs, timeout=60, check=True)
        assert select.select([ours], [], [], 5)[0]
        assert b"mainline" in os.read(ours, 65536)
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_bound_is_said_in_words() -> None:
    assert str(Bound(1, 2, 1)) == "1 overlay and a host, 2 fds each, 1 error"


def test_every_design_names_its_source() -> None:
    for design in DESIGNS.values():
        assert design.source
        assert design.title
        assert (type(design).__doc__ or "").strip()
