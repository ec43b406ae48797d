"""What a server that lives for long must not pile up, and what one disk must not do to the others."""

import os
import threading
import time
from collections.abc import Callable

import pytest

from overt.server.client import Client

from .scene import Scene, Server, fsync, wait_until

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
