"""SPIN visits the same model (tools/spin/check_error.pml) and finds as many states."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from overt.prove.checker import Checker
from overt.prove.designs import DESIGNS
from overt.prove.scope import SCOPES, Bound

MODEL = Path(__file__).resolve().parents[2] / "tools/spin/check_error.pml"
START = 1
"""states that are SPIN's own: before the one process of its model has run"""


@pytest.mark.timeout(120)
@pytest.mark.skipif(not (shutil.which("spin") and shutil.which("gcc")), reason="spin or gcc is not installed")
@pytest.mark.parametrize("bound", [Bound(1, 1, 1), Bound(2, 1, 1), Bound(2, 1, 2)])
def test_spin_finds_as_many_states(bound: Bound, tmp_path: Path) -> None:
    # -o2: without dead variable elimination, which resets variables of this model that are needed.
    spin = ["spin", "-a", "-o2", f"-DOVERLAYS={bound.overlays}", f"-DERRORS={bound.errors}", str(MODEL)]
    subprocess.run(spin, cwd=tmp_path, check=True, timeout=30, capture_output=True)
    subprocess.run(
        ["gcc", "-w", "-O1", "-DSAFETY", "-DNOREDUCE", "-o", "pan", "pan.c"], cwd=tmp_path, check=True, timeout=60
    )
    done = subprocess.run(["./pan", "-m1000000"], cwd=tmp_path, check=True, timeout=60, capture_output=True, text=True)
    (found,) = re.findall(r"(\d+) states, stored", done.stdout)
    checker = Checker(DESIGNS["check_error"], SCOPES["syncfs"], bound, (False,) * bound.overlays, symmetry=False)
    assert int(found) == checker.run().states + START
