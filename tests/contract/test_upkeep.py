"""What a server that lives for long must not pile up, and what one disk must not do to the others."""

import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from overt.host import mounts
from overt.server.client import Client

from .scene import EIO, Scene, Server, fsync, run_overt, wait_until

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]


def threads(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.pid}/task"))


def test_the_workers_of_an_upper_end_with_its_last_mount(ext4: Scene) -> None:
    overlays = [ext4.overlay() for _ in range(2)]
    fds = [overlays[0].write(f"file-{number}") for number in range(12)]
    askers = [threading.Thread(target=fsync, args=(fd,)) for fd in fds]
    before = threads(ext4.server)
    ext4.disk.hang(15)
    for asker in askers:
        asker.start()
    wait_until(lambda: threads(ext4.server) >= before + 10, "there is a thread for each who waits for the disk")
    ext4.disk.resume()
    for asker in askers:
        asker.join()
    for fd in fds:
        ext4.close(fd)
    most = threads(ext4.server)
    overlays.pop().umount()
    assert threads(ext4.server) > most - 8
    overlays.pop().umount()
    wait_until(lambda: threads(ext4.server) <= most - 8, "they have ended")


def test_the_table_of_descriptors_does_not_grow_while_requests_wait(ext4: Scene) -> None:
    """Its threads would wait for that, 5 to 16 ms each time."""
    with open(f"/proc/{ext4.server.pid}/status") as status:
        size = next(int(line.split()[1]) for line in status if line.startswith("FDSize:"))
    assert size >= min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 1 << 14)


def test_a_mount_that_hangs_on_its_disk_keeps_nobody_from_another(stage: Callable[..., Scene]) -> None:
    """Without a tracepoint, and with an error that nobody has seen, the first look at an upper has to flush it."""
    hung, well = stage("ext4", off="tracing"), stage("ext4", off="tracing")
    (hung.root / "lost").write_bytes(hung.page)
    hung.fail()
    (hung.root / "dirty").write_bytes(hung.page)
    overlay, options = hung.make()

    def mount() -> None:
        with Client(hung.server.socket) as client:
            client.mount(str(overlay.target), options)

    thread = threading.Thread(target=mount)
    hung.disk.hang(15)
    try:
        thread.start()
        thread.join(0.5)
        begun = time.monotonic()
        well.overlay().umount()
        assert well.server.client.status()["mounts"] == []
        assert time.monotonic() - begun < 3
        assert thread.is_alive()
    finally:
        hung.disk.resume()
        thread.join()
    hung.overlays.append(overlay)


def test_of_errors_without_end_the_latest_are_shown_and_every_rule_holds(ext4: Scene) -> None:
    early, volatile = ext4.overlay(), ext4.overlay(volatile=True)
    victims = [early.write(f"victim-{number:02}", data=b"") for number in range(30)]
    for fd in victims:
        os.pwrite(fd, ext4.page, 0)
        ext4.fail()
        assert volatile.new_syncfs() == EIO  # and the error is known: the next is another
    late = ext4.overlay()
    assert any("30 error(s) before this mount" in line for line in ext4.notices)

    status = ext4.server.upper_status()
    assert (status["recorded"], [error["number"] for error in status["errors"]]) == (30, [*range(11, 31)])
    assert "30 errors, the latest 20 of them:" in run_overt("status").stdout
    assert [early.new_syncfs(), early.new_syncfs(), late.new_syncfs()] == [EIO, 0, 0]
    assert [volatile.new_syncfs(), volatile.new_fsync(".")] == [EIO, EIO]
    for fd in victims:
        assert fsync(fd) == EIO
        ext4.close(fd)
    mounts = {mount["target"]: mount for mount in ext4.server.client.status()["mounts"]}
    shown = mounts[str(early.target)]
    assert (shown["errors"], shown["lost_files"], shown["lost"]) == (
        30, 30, [f"/victim-{number:02}" for number in range(10, 30)],
    )  # fmt: skip
    assert "lost: these are the latest of 30 files" in run_overt("status").stdout
    record = early.umount()
    assert (record["verdict"], record["errors"], len(record["files"])) == ("lost", 30, 30)
    assert (late.umount()["verdict"], volatile.umount()["verdict"]) == ("no error recorded", "may be lost")


def test_whom_an_error_was_told_is_counted_among_the_mounts_of_its_upper(ext4: Scene, tmp_path: Path) -> None:
    victim = ext4.overlay()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    fd = mounts.new_mount("tmpfs", [])
    mounts.attach(fd, elsewhere)
    os.close(fd)
    try:
        for name in ("lower", "upper", "work", "merged"):
            (elsewhere / name).mkdir()
        names = f"lowerdir={elsewhere}/lower,upperdir={elsewhere}/upper,workdir={elsewhere}/work"
        ext4.server.client.mount(str(elsewhere / "merged"), names)
        ext4.close(victim.lose("lost"))
        assert victim.new_syncfs() == EIO
        shown = run_overt("status").stdout
        ext4.server.client.umount(str(elsewhere / "merged"))
    finally:
        mounts.umount(elsewhere, mounts.MNT_DETACH)
    assert "told to 1 of 1 mounts" in shown


def test_files_that_only_the_tracepoint_saw_fail_are_named_however_many_errors_followed(ext4: Scene) -> None:
    victim, other = ext4.overlay(), ext4.overlay()
    ext4.close(victim.lose("first"))
    for number in range(30):
        ext4.close(other.lose(f"{number}"))
        assert other.new_syncfs() == EIO
    assert victim.umount()["files"] == ["/first"]
