"""Cells that are played: real mounts, real faults, and nothing left behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overt.judge import choice, expected
from overt.judge.cells import cells as cells_of
from overt.judge.play import Outcome

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

SYSTEMS = (
    "plain", "kernel", "kernel volatile", "fuse-overlayfs", "fuse-overlayfs volatile", "overt", "overt volatile",
    "overt guard",
)  # fmt: skip
CASES = ("U1", "U4", "U5", "U8", "U11", "U13-durable", "U18-directory")


def judge(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "overt", "judge", *args]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=110, **more)


@pytest.fixture(scope="module")
def run() -> subprocess.CompletedProcess[str]:
    return judge("--only", ",".join(CASES), "--systems", ",".join(SYSTEMS), "--json")


@pytest.fixture
def cells(run: subprocess.CompletedProcess[str]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(cell["scenario"].partition("-")[0], cell["system"]): cell for cell in json.loads(run.stdout)}


def verdicts(cells: dict[tuple[str, str], dict[str, Any]], system: str) -> dict[str, str]:
    return {case: cell["verdict"] for (case, name), cell in cells.items() if name == system}


Cells = dict[tuple[str, str], dict[str, Any]]


def test_kernel_overlayfs_tells_by_fsync_and_not_by_syncfs(cells: Cells) -> None:
    assert verdicts(cells, "kernel") == {
        "U1": "holds", "U4": "not applicable", "U5": "violated", "U8": "violated", "U11": "violated", "U13": "holds",
        "U18": "holds",
    }  # fmt: skip
    assert cells["U5", "kernel"]["reason"] == "A: newly syncfs .: 0, due told"


def test_volatile_kernel_overlayfs_tells_everybody(cells: Cells) -> None:
    assert verdicts(cells, "kernel volatile")["U4"] == "holds"


@pytest.mark.skipif(not shutil.which("fuse-overlayfs"), reason="fuse-overlayfs is not installed")
def test_fuse_overlayfs_never_hears_of_syncfs_and_volatile_tells_nobody(cells: Cells) -> None:
    found = verdicts(cells, "fuse-overlayfs")
    assert (found["U1"], found["U5"], found["U13"]) == ("holds", "violated", "violated")
    assert verdicts(cells, "fuse-overlayfs volatile")["U4"] == "violated"


def test_the_plain_filesystem_tells_one_of_many(cells: Cells) -> None:
    history = cells["U5", "plain"]["history"]
    assert [call["answer"] for call in history if call["call"] == "newly syncfs ."] == ["EIO", "0", "0"]


def test_overt_holds_and_the_exit_status_says_so(run: subprocess.CompletedProcess[str], cells: Cells) -> None:
    for system in ("overt", "overt volatile", "overt guard"):
        assert set(verdicts(cells, system).values()) == {"holds", "not applicable"}
    assert (run.returncode, run.stderr) == (0, "")


def test_every_cell_is_as_expected(cells: Cells) -> None:
    known = expected.load()
    if known["kernel"] != expected.kernel(os.uname().release):
        pytest.skip("expectations are of another kernel")
    found = [
        Outcome(cell["scenario"], cell["system"], cell["upper"], cell["verdict"], cell["reason"])
        for cell in cells.values()
    ]
    played = cells_of(choice.choose([], CASES, None), choice.choose_systems(SYSTEMS, [], []), ["ext4"])
    assert expected.differences(found, played, known) == []


def test_a_history_says_who_called_what_what_was_answered_and_what_the_disk_did(cells: Cells) -> None:
    history = cells["U1", "plain"]["history"]
    assert [(call["who"], call["call"], call["answer"], call["due"]) for call in history] == [
        ("A", "mount", "0", ""),
        ("A", "f = open lost rw create", "0", ""),
        ("A", "fsync f", "0", ""),
        ("disk", "fail data", "0", ""),
        ("A", "write f doomed", "0", ""),
        ("disk", "push", "0", ""),
        ("disk", "heal", "0", ""),
        ("A", "fsync f", "EIO", "told"),
        ("A", "fsync f", "0", "0"),
    ]
    assert "1 refused" in history[5]["disk"]
    assert [call["at"] for call in history] == sorted(call["at"] for call in history)


OWN = """
title = "a scenario of one's own"
need = "must"
mounts = ["ordinary", "volatile"]
claim = "What a claim says."
steps = [{steps}]
"""


def own(path: Path, *steps: str, name: str = "mine") -> str:
    file = path / f"{name}.toml"
    file.write_text(OWN.replace("{steps}", ", ".join(f'"{step}"' for step in steps)))
    return str(file)


def one(*args: str) -> dict[str, Any]:
    done = judge("--json", *args)
    assert done.stdout, done.stderr
    (cell,) = json.loads(done.stdout)
    return dict(cell)


UNHURT = ("A: mount", "A: f = open lost rw create", "disk: fail data", "A: write f safe", "disk: push")


def test_a_fault_that_did_not_happen_leaves_the_cell_unknown(tmp_path: Path) -> None:
    """Were the witness not asked, fsync's 0 would be held against the filesystem."""
    cell = one(own(tmp_path, *UNHURT, "A: fsync f -> told"), "--systems", "plain")
    assert cell["verdict"] == "unknown"
    assert cell["reason"] == "the disk was not asked for anything that it should refuse"


def test_a_premise_that_fails_leaves_the_cell_unknown(tmp_path: Path) -> None:
    cell = one(own(tmp_path, "A: mount", "A: f = open absent", "A: fsync f -> 0"), "--systems", "plain")
    assert (cell["verdict"], cell["reason"]) == ("unknown", "A: f = open absent: ENOENT")


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (("A: mount", "A: fsync f -> 0"), "fsync f: KeyError: 'f'"),
        (("A: fsync f -> 0",), "A is not mounted"),
        (("A: mount", "A: mount -> 0"), "A is mounted already"),
        (("A: mount", "disk: replay 5 -> kept"), "replay without record"),
        (("A: mount", "disk: record", "disk: replay 5 -> kept"), "replay, and nothing was promised"),
    ],
)
def test_a_scenario_that_makes_no_sense_says_what_is_wrong(steps: tuple[str, ...], words: str, tmp_path: Path) -> None:
    cell = one(own(tmp_path, *steps), "--systems", "plain")
    assert cell["verdict"] == "unknown"
    assert "makes no sense" in cell["reason"] and words in cell["reason"]


def test_a_scratch_directory_that_no_option_can_name_is_one_line(tmp_path: Path) -> None:
    place = tmp_path / "a,b"
    place.mkdir()
    done = judge("--only", "U1", "--systems", "plain", env={**os.environ, "TMPDIR": str(place)})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert str(place) in done.stderr


def test_a_file_that_is_no_scenario_is_bad_usage(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("steps = 1 =")
    done = judge(str(tmp_path / "broken.toml"))
    assert done.returncode == 2
    assert "broken.toml" in done.stderr and done.stderr.count("\n") == 1


QUICK = ("A: mount", "A: f = open new rw create", "A: write f safe", "A: fsync f -> 0")


def test_a_command_of_the_users_is_a_system_too(tmp_path: Path) -> None:
    """mount(8) with kernel overlayfs, as somebody may have wrapped it."""
    script = tmp_path / "my-overlay"
    script.write_text('#!/bin/sh\nexec mount -t overlay mine -o "lowerdir=$1,upperdir=$2,workdir=$3" "$4"\n')
    script.chmod(0o755)
    done = judge(
        "--json", own(tmp_path, *QUICK), "--systems", "plain",
        "--system", f"{script} {{lower}} {{upper}} {{work}} {{mount}}", "--system", "false {mount}",
    )  # fmt: skip
    found = {cell["system"]: (cell["verdict"], cell["reason"]) for cell in json.loads(done.stdout)}
    assert found["my-overlay (given)"] == ("holds", "")
    assert found["false (given)"] == ("unknown", "A: mount: refused: exit status 1")


def test_a_system_that_is_not_installed_is_unknown_with_the_reason(tmp_path: Path) -> None:
    done = judge("--json", own(tmp_path, *QUICK), "--systems", "plain", "--system", "no-such-overlay {mount}")
    cell = json.loads(done.stdout)[1]
    assert (cell["verdict"], cell["reason"]) == ("unknown", "no-such-overlay is not installed")


def test_runs_are_kept_apart_and_a_cell_that_changes_is_flaky(tmp_path: Path) -> None:
    """A system that mounts every other time."""
    script = tmp_path / "moody"
    script.write_text(
        f"#!/bin/sh\n[ -e {tmp_path}/mood ] && {{ rm {tmp_path}/mood; exit 7; }}\ntouch {tmp_path}/mood\n"
        'exec mount -t tmpfs moody "$1"\n'
    )
    script.chmod(0o755)
    scenario = own(tmp_path, "A: mount -> 0")
    done = judge(
        "--json", scenario, "--systems", "plain", "--system", f"{script} {{mount}}", "--runs", "2", "--jobs", "1"
    )
    cell = json.loads(done.stdout)[1]
    assert (cell["verdict"], sorted(cell["runs"])) == ("flaky", ["holds", "violated"])
    assert cell["reason"].startswith(("holds 1, violated 1 of 2;", "violated 1, holds 1 of 2;"))


def processes_with(word: str) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                environment = Path(f"/proc/{name}/environ").read_bytes()
            except OSError:
                continue
            if word.encode() in environment:
                found.append(int(name))
    return found


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_killed_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    """No process, no directory; mounts and loop devices are counted at the end of the session (conftest.py)."""
    mark = f"judge-{os.getpid()}-{number}"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "MARK": mark}
    command = [sys.executable, "-m", "overt", "judge", "--only", "U5,U6", "--systems", "fuse-overlayfs,overt,kernel"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, start_new_session=True) as process:
        wait_until(lambda: len(processes_with(mark)) > 8, "cells are being played")
        os.killpg(process.pid, number)
        process.wait(60)
    wait_until(lambda: not processes_with(mark), f"left: {processes_with(mark)}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["table", "json"])
def test_ctrl_c_shows_what_is_known_so_far(form: str, tmp_path: Path) -> None:
    """The second cell of four is a system that never mounts."""
    mark, scratch = f"judge-{os.getpid()}-{form}", tmp_path / "scratch"
    scratch.mkdir()
    script = tmp_path / "never"
    script.write_text("#!/bin/sh\nexec sleep 1000\n")
    script.chmod(0o755)
    command = [sys.executable, "-m", "overt", "judge", "--only", "U1,U3", "--systems", "plain", "--jobs", "1"]
    command += ["--system", f"{script} {{mount}}", "--check", *(["--json"] if form == "json" else [])]
    environment = {**os.environ, "TMPDIR": str(scratch), "MARK": mark}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True, start_new_session=True
    ) as process:
        wait_until(lambda: "sleep" in map(name_of, processes_with(mark)), "the second cell is being played")
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "overt judge: interrupted: 1 of 4 cells were played\n")
    if form == "json":
        assert [(cell["scenario"], cell["verdict"]) for cell in json.loads(out)] == [("U1-fsync", "holds")]
    else:
        assert re.search(r"^ U1-fsync +│must│ yes +$", out, re.MULTILINE), out
        assert re.search(r"^ U3-fsync-late *│nice│ +$", out, re.MULTILINE), out
    wait_until(lambda: not processes_with(mark), f"left: {processes_with(mark)}")
    assert list(scratch.iterdir()) == []


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def test_an_overseer_that_is_killed_leaves_no_process_and_no_disk(tmp_path: Path) -> None:
    mark = f"judge-{os.getpid()}-overseer"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "MARK": mark}
    command = [sys.executable, "-m", "overt", "judge", "--only", "U5,U6", "--systems", "overt,kernel"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, text=True
    ) as process:
        wait_until(lambda: len(processes_with(mark)) > 8, "cells are being played")
        (overseer,) = [
            int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
        os.kill(overseer, signal.SIGKILL)
        assert process.wait(60) == 1
        assert process.stderr is not None and "died" in process.stderr.read()
    wait_until(lambda: not processes_with(mark), f"left: {processes_with(mark)}")


def test_a_cell_that_hangs_is_put_down_and_the_run_goes_on(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGING, own(tmp_path, *QUICK)], capture_output=True, text=True, timeout=100
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["unknown", "it did not end in 3 s"], ["holds", ""]]


HANGING = """
import json, sys, time
from pathlib import Path
from overt.judge import cells, scenario, systems
class Hanging(systems.Plain):
    def mount(self, layers, target):
        time.sleep(1000)
cells.DEADLINE, cells.EACH_MORE = 3.0, 0.0
todo = cells.cells([scenario.read(Path(sys.argv[1]))], [Hanging("hanging"), systems.Plain("plain")], ["ext4"])
with cells.judge(todo, 1, 1) as arriving:
    print(json.dumps([[outcome.verdict, outcome.reason] for outcome in arriving]))
"""
