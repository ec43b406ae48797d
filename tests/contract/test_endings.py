"""Several who end a mount at once: one verdict, nobody fails for being second, nobody waits for a server that ends."""

import json
import os
import signal
import threading
import time

import pytest

from overt.host import mounts
from overt.server.client import Client, ServerError
from overt.server.watchdog import abort

from .conftest import Servers
from .scene import Overlay, Server, open_scene, run_overt, wait_until
from .test_many_disks import has_ended
from .test_rule_10_the_last_flush import in_the_tree, on_the_disk, outcome, umount

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

SLOWLY = 1.0
WELL = "no error recorded"


class Umount(threading.Thread):
    """An unmount of overt's own, beside whatever else happens: it has begun a few milliseconds later."""

    def __init__(self, overlay: Overlay) -> None:
        super().__init__(daemon=True)
        self._overlay = overlay
        self._verdict: object = None
        self.start()

    def run(self) -> None:
        client = Client(self._overlay.scene.server.socket)
        try:
            self._verdict = client.umount(str(self._overlay.target))["verdict"]
        except (ServerError, OSError) as error:
            self._verdict = error
        finally:
            client.close()

    def result(self) -> object:
        """The verdict, or the error."""
        self.join(30)
        assert not self.is_alive(), "the unmount has not ended"
        return self._verdict


def logged(server: Server, kind: str) -> list[dict[str, object]]:
    """Events of a server that has ended."""
    events = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    return [event for event in events if event["event"] == kind]


def test_whoever_is_second_has_the_same_verdict(servers: Servers) -> None:
    with open_scene("ext4", servers.start(f"slow_flush:{SLOWLY}")) as scene:
        overlay, _ = scene.overlay(), scene.overlay()
        scene.close(overlay.write("file"))
        first = Umount(overlay)
        time.sleep(SLOWLY / 2)
        second = Umount(overlay)
        assert [first.result(), second.result()] == [WELL, WELL]
        scene.overlays.remove(overlay)
        assert outcome(overlay) == ("no error recorded", True, [])


def test_who_is_overtaken_by_umount_of_somebody_else_is_not_told_that_it_failed(servers: Servers) -> None:
    with open_scene("ext4", servers.start(f"slow_flush:{SLOWLY}")) as scene:
        overlay, _ = scene.overlay(), scene.overlay()
        scene.close(overlay.write("file"))
        ours = Umount(overlay)
        time.sleep(SLOWLY / 2)
        umount(overlay)
        assert ours.result() == WELL
        assert outcome(overlay) == ("no error recorded", True, [])


def test_a_server_that_ends_while_somebody_unmounts_has_nothing_to_complain_of(servers: Servers) -> None:
    server = servers.start(f"slow_flush:{SLOWLY}")
    with open_scene("ext4", server) as scene:
        overlay = scene.overlay()
        scene.close(overlay.write("file"))
        ours = Umount(overlay)
        time.sleep(SLOWLY / 2)
        assert server.stop() == 0
        assert ours.result() == WELL
        scene.overlays.remove(overlay)
    assert logged(server, "busy") == []
    assert len(logged(server, "unmounted")) == 1


def test_what_is_in_use_when_the_server_ends_is_flushed_and_has_a_verdict(servers: Servers) -> None:
    server = servers.start()
    with open_scene("ext4", server) as scene:
        overlay = scene.overlay()
        fd = overlay.write("file", data=b"")
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not in_the_tree(overlay), "it was detached")
        os.write(fd, scene.disk.marker)
        assert server.process.wait(30) == 1
        assert on_the_disk(scene)
        scene.overlays.remove(overlay)
    (verdict,) = logged(server, "aborted")
    assert (verdict["mount"], verdict["verdict"]) == (str(overlay.target), "no error recorded")
    server.client.close()


def test_an_unmount_that_comes_too_late_does_not_keep_the_server(servers: Servers) -> None:
    """Its thread would be in umount(2), whose goodbye nobody reads any more: for ever, and every sync(2) with it."""
    server = servers.start("closing,slow_flush:6")
    with open_scene("ext4", server) as scene:
        overlay = scene.overlay()
        device = os.stat(overlay.target).st_dev
        ours = Umount(overlay)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        try:
            wait_until(lambda: has_ended(server.pid), "the server ends", 20)
        except AssertionError:
            abort(device)
            raise
        server.process.wait(5)
        assert isinstance(ours.result(), Exception)
        scene.overlays.remove(overlay)
        with_the_mount(overlay)
    server.client.close()


def with_the_mount(overlay: Overlay) -> None:
    """Take away what a server has left in the tree."""
    if in_the_tree(overlay):
        mounts.umount(str(overlay.target), mounts.MNT_DETACH)


def test_a_mount_asked_for_while_the_server_ends_is_refused_and_keeps_nobody(servers: Servers) -> None:
    server = servers.start(f"slow_connect:{SLOWLY}")
    with open_scene("ext4", server) as scene:
        first = scene.overlay()
        late, options = scene.make()
        answers: list[object] = []

        def ask() -> None:
            try:
                answers.append(server.client.mount(str(late.target), options))
            except (ServerError, OSError) as error:
                answers.append(error)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        time.sleep(SLOWLY / 2)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: has_ended(server.pid), "the server ends", 20)
        assert server.process.wait(5) == 0
        thread.join(10)
        assert isinstance(answers[0], Exception)
        assert not in_the_tree(late)
        scene.overlays.remove(first)


def test_overt_umount_of_a_connection_that_was_just_aborted_takes_the_mount_away(servers: Servers) -> None:
    with open_scene("ext4", servers.start(f"slow_flush:{SLOWLY}")) as scene:
        overlay, other = scene.overlay(), scene.overlay()
        scene.close(overlay.write("file"))
        abort(os.stat(overlay.target).st_dev)
        time.sleep(SLOWLY / 2)
        assert run_overt("umount", str(overlay.target)).returncode == 0
        assert not in_the_tree(overlay)
        assert on_the_disk(scene)
        scene.overlays.remove(overlay)
        other.umount()
