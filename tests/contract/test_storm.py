"""Many mounts at once: a thousand questions cost a handful of flushes, counted at the disk, and so does a sync(2)."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from overt.lab import bounded

from .scene import EIO, Scene, syncfs, wait_until

pytestmark = pytest.mark.root

Stage = Callable[..., Scene]
MOST_FLUSHES = 5


def all_ask_at_once(scene: Scene, mounts: int, each: int) -> None:
    """The disk stands still until everybody waits, so that they really are there at the same time."""
    overlays = [scene.overlay() for _ in range(mounts)]
    for overlay in overlays[::10]:
        scene.close(overlay.write("file", data=b"x"))
    container = scene.container()
    fds = [container.open(overlay.target) for overlay in overlays for _ in range(each)]
    before = scene.disk.counters().flushes
    scene.disk.hang()
    try:
        container.begin("syncfs_all", fds)
        wait_until(lambda: waiting_in_syncfs(container.pid) == len(fds), "all are in syncfs", 60)
        time.sleep(0.5)  # and the server has read what they sent
    finally:
        scene.disk.resume()
    assert container.end() == 0
    assert scene.disk.counters().flushes - before <= MOST_FLUSHES


def waiting_in_syncfs(pid: int) -> int:
    count = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            call = Path(f"/proc/{pid}/task/{task}/syscall").read_text().split()[0]
        except (OSError, IndexError):
            continue
        count += call in ("306", "267")
    return count


@pytest.mark.timeout(120)
def test_a_thousand_syncfs_at_once_cost_a_handful_of_flushes(scene: Scene) -> None:
    all_ask_at_once(scene, mounts=200, each=5)


@pytest.mark.timeout(120)
def test_without_coalescing_they_cost_one_each(stage: Stage) -> None:
    with pytest.raises(AssertionError, match="<="):
        all_ask_at_once(stage("ext4", off="coalescing"), mounts=4, each=4)


# sync(2)


def sync_within_a_minute() -> None:
    """In a process of its own, which nobody waits for longer: it visits every filesystem of the machine."""
    pid = os.fork()
    if pid == 0:
        os.sync()
        os._exit(0)
    status = bounded.wait(pid, 60)
    assert status == 0, "sync(2) took longer than a minute"


def one_sync(scene: Scene, mounts: int) -> None:
    overlays = [scene.overlay() for _ in range(mounts)]
    old = overlays[-1].open()
    for overlay in overlays[::10]:
        scene.close(overlay.write("file", data=b"x"))
    before = scene.disk.counters().flushes
    sync_within_a_minute()
    assert scene.disk.counters().flushes - before <= MOST_FLUSHES
    overlays[0].lose()
    sync_within_a_minute()
    assert [overlay.new_syncfs() for overlay in overlays] == [EIO] * mounts
    assert [syncfs(old), syncfs(old)] == [EIO, 0]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_one_sync_over_a_thousand_mounts_costs_a_handful_of_flushes_and_swallows_nothing(stage: Stage) -> None:
    one_sync(stage("ext4", mount_options="commit=300"), mounts=1000)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_served_as_syncfs_is_it_costs_one_for_each_mount(stage: Stage) -> None:
    with pytest.raises(AssertionError, match="<="):
        one_sync(stage("ext4", off="quiet_sync", mount_options="commit=300"), mounts=50)
