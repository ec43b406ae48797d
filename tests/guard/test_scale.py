"""A thousand listeners: processes with a filter of their own on overlays of their own, without a runtime."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .ground import EIO, Ground, fail, wait_until
from .lone import Lone, several

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

MIB = 1 << 20


@pytest.fixture
def lone(guarded: Ground, request: pytest.FixtureRequest) -> Iterator[list[Lone]]:
    with several(guarded, request.param) as made:
        yield made


def resident(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


@pytest.mark.parametrize("lone", [60, pytest.param(1000, marks=pytest.mark.long)], indirect=True)
def test_containers_that_all_call_at_once_share_a_few_flushes(guarded: Ground, lone: list[Lone]) -> None:
    assert guarded.guard is not None
    guard = guarded.guard

    def ready() -> bool:
        overlays = guard.status()["overlays"]
        return len(overlays) == len(lone) and all(each["guarded"] for each in overlays)

    wait_until(ready, "all are guarded", 120)
    memory = [resident(pid) for pid in (guard.process.pid, guard.worker)]
    flushes = guard.status()["uppers"][0]["flushes"]
    for expected in (0, EIO, 0):
        if expected:
            fd = os.open(Path(guarded.disk.path, "victim"), os.O_WRONLY | os.O_CREAT)
            os.write(fd, guarded.disk.marker * 256)
            os.close(fd)
            fail(guarded.disk)
        time.sleep(2.1)  # who has just called is no part of a crowd
        begun = time.monotonic()
        for each in lone:
            each.go.send(b"!")
        answers = [each.answer() for each in lone]
        assert [code for code, _ in answers] == [expected] * len(lone)
        spent = max(when for _, when in answers) - begun
        upper = guard.status()["uppers"][0]
        after = max(when for _, when in answers) - upper["flushed_at"]
        print(
            f"{len(lone)} at once, errno {expected}: {upper['flushes'] - flushes} flushes, all answered in "
            f"{spent * 1000:.0f} ms, {after * 1000:.0f} ms after the last flush"
        )
        assert upper["flushes"] - flushes <= 5
        assert after <= 0.25
        flushes = upper["flushes"]
    print(f"resident: supervisor {memory[0]:.0f} MiB, worker {memory[1]:.0f} MiB")
    assert guard.status()["crashes"] == 0
