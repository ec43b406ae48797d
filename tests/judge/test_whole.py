"""The whole matrix against what is expected, a thousand containers, and the document's own example."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from overt.judge import expected

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parents[2]


def judge(*args: str, seconds: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "overt", "judge", *args]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)


@pytest.mark.timeout(60)
def test_the_scenario_that_the_document_shows_can_be_played(tmp_path: Path) -> None:
    found = re.search(r"```toml\n(.*?)```", (ROOT / "docs/judge.md").read_text(), re.DOTALL)
    assert found
    (tmp_path / "rename.toml").write_text(found[1])
    done = judge(str(tmp_path / "rename.toml"), "--systems", "kernel,overt", "--json", seconds=50)
    assert [(cell["system"], cell["verdict"]) for cell in json.loads(done.stdout)] == [
        ("kernel", "violated"), ("overt", "holds"),
    ]  # fmt: skip


here = pytest.mark.skipif(
    expected.load()["kernel"] != expected.kernel(os.uname().release), reason="expectations are of another kernel"
)


@here
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("upper", ["ext4", "xfs", "btrfs"])
def test_every_cell_is_as_expected_three_times_of_three(upper: str) -> None:
    done = judge("--fs", upper, "--runs", "3", "--check", seconds=1700)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("system", "told"),
    [
        ("plain", 1),
        ("kernel", 0),
        ("fuse-overlayfs", 0),
        ("overt", 1000),
        ("overt strict", 1000),
        ("overt guard", 1000),
    ],
)
def test_of_a_thousand_containers_so_many_are_told_at_the_first_call(system: str, told: int) -> None:
    done = judge("--only", "U5", "--containers", "1000", "--systems", system, "--json", seconds=800)
    (cell,) = json.loads(done.stdout)
    if "not installed" in cell["reason"]:
        pytest.skip(cell["reason"])
    answers = [call["answer"] for call in cell["history"] if call["call"].startswith("newly")]
    assert (len(answers), answers.count("EIO")) == (1000, told)
    assert cell["verdict"] == ("holds" if told == 1000 else "violated")
