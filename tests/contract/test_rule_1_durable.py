"""Rule 1: syncfs returns only after the upper is flushed, its device's cache too. The disk says so, not the server."""

import mmap
import os
from collections.abc import Callable

import pytest

from overt.host import mounts

from .scene import PAGE, Overlay, Scene, syncfs

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

Stage = Callable[..., Scene]
PAGES = 512


def written_with_write(scene: Scene, extra: str = "") -> None:
    overlay = scene.overlay(extra)
    overlay.write("file")
    settles(scene, overlay, 1)


def settles(scene: Scene, overlay: Overlay, pages: int) -> None:
    flushes = scene.disk.counters().flushes
    assert overlay.new_syncfs() == 0
    assert pages_in(scene.disk.snapshot(durable=True), scene.disk.marker) == pages
    assert scene.disk.counters().flushes > flushes


def pages_in(snapshot: mmap.mmap, marker: bytes) -> int:
    """How many pages that begin with the marker the disk holds."""
    count, place = 0, snapshot.find(marker)
    while place >= 0:
        count += 1
        place = snapshot.find(marker, place + PAGE)
    return count


def written_with_a_mapping(scene: Scene, extra: str = "", *, closed: bool = False) -> None:
    """Every other page, so that they are written back one by one, and many are still on their way when SYNCFS is."""
    overlay = scene.overlay(extra)
    fd = overlay.write("file", data=b"")
    os.truncate(fd, 2 * PAGES * PAGE)
    with mmap.mmap(fd, 2 * PAGES * PAGE) as mapping:
        for number in range(PAGES):
            mapping[2 * number * PAGE : 2 * number * PAGE + 16] = scene.disk.marker
        if not closed:
            settles(scene, overlay, PAGES)
            return
    scene.close(fd)
    settles(scene, overlay, PAGES)


@pytest.mark.parametrize("extra", ["", "nopassthrough"])
def test_what_was_written_is_on_the_device(scene: Scene, extra: str) -> None:
    written_with_write(scene, extra)


@pytest.mark.parametrize("extra", ["", "nopassthrough"])
@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_what_was_written_through_a_mapping_is_on_the_device(scene: Scene, extra: str, closed: bool) -> None:
    written_with_a_mapping(scene, extra, closed=closed)


def test_without_the_flush_it_is_not(stage: Stage, filesystem: str) -> None:
    with pytest.raises(AssertionError, match="assert 0 == 1"):
        written_with_write(stage(filesystem, off="flushing"))


def test_what_another_descriptor_another_process_or_a_removed_file_wrote_is_on_the_device(scene: Scene) -> None:
    overlay = scene.overlay()
    data = [os.urandom(PAGE) for _ in range(3)]
    first = overlay.write("file", data=data[0])
    scene.close(first)
    nameless = overlay.open(".", os.O_TMPFILE | os.O_RDWR)
    os.write(nameless, data[1])
    pid = os.fork()
    if pid == 0:
        os.pwrite(nameless, data[2], PAGE)
        os._exit(0)
    os.waitpid(pid, 0)
    assert overlay.new_syncfs() == 0
    durable = scene.disk.snapshot(durable=True)
    assert [page in durable for page in data] == [True, True, True]


def test_a_page_dirtied_while_a_flush_is_under_way_is_in_the_next(ext4: Scene) -> None:
    """Coalescing must not answer a caller with a flush that began before it called."""
    overlay = ext4.overlay()
    first, second = os.urandom(PAGE), os.urandom(PAGE)
    containers = [ext4.container(), ext4.container()]
    fds = [container.open(overlay.target) for container in containers]
    overlay.write("first", data=first)
    ext4.disk.hang()
    try:
        containers[0].begin("syncfs", fds[0])
        overlay.write("second", data=second)
        containers[1].begin("syncfs", fds[1])
    finally:
        ext4.disk.resume()
    assert containers[0].end() == 0
    assert first in ext4.disk.snapshot(durable=True)
    assert containers[1].end() == 0
    assert second in ext4.disk.snapshot(durable=True)


def test_when_the_device_cannot_flush_syncfs_says_so(scene: Scene) -> None:
    overlay = scene.overlay()
    old = overlay.open()
    overlay.write("file", data=os.urandom(PAGE))
    scene.disk.fail("flush")
    codes = [syncfs(old), syncfs(old)]
    scene.disk.heal()
    assert 0 not in codes


def test_sync_flushes_pages_that_a_mapping_has_left_in_the_upper(stage: Stage, filesystem: str) -> None:
    """It writes the upper's pages before this mount's, which are the upper's only then."""
    scene = stage(filesystem, off="remount_as_sync")
    overlay = scene.overlay("nopassthrough")
    fd = overlay.write("file", data=b"x" * PAGE)
    with mmap.mmap(fd, PAGE) as mapping:
        mapping[:16] = scene.disk.marker
        flushes = scene.server.upper_status(scene.upper_device())["flushes"]
        for _ in range(3):
            root = overlay.open()
            mounts.reconfigure(root, "rw")
            scene.close(root)
            assert scene.disk.marker in scene.disk.snapshot(durable=True)
    assert scene.server.upper_status(scene.upper_device())["flushes"] == flushes + 1
