"""A command that mounts is ended before it has heard that the mount is there: all or nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from overt.cli import background
from overt.overlay.options import parse
from overt.server import registry
from overt.server.client import Client, start

from .conftest import SOURCE, Place

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

_SLOW = """
import os, signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
number = int(sys.argv.pop(1))
from overt.server.service import Service
mount = Service.mount

def slow(*given):
    notices = mount(*given)
    command = os.getppid()
    os.kill(command, number)
    while os.getppid() == command:
        time.sleep(0.01)
    return notices

Service.mount = slow
from overt.cli.{} import main
main()
"""

_PARENT = """
import os, subprocess, sys
sys.path.insert(0, sys.argv[1])
from overt.host.process import adopt_orphans
adopt_orphans()
statuses = [subprocess.Popen(sys.argv[2:]).wait()]
while True:
    try:
        statuses.append(os.waitstatus_to_exitcode(os.wait()[1]))
    except ChildProcessError:
        break
print(*statuses)
"""
"""runs a command, and prints its exit status and those of all that it leaves behind: the server"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("module", ["main", "helper", "fuse_overlayfs"])
def test_what_nobody_waits_for_is_unmounted(place: Place, module: str, number: int) -> None:
    words = {
        "main": ["mount", "-o", place.options, place.merged],
        "helper": ["overt", place.merged, "-o", place.options],
        "fuse_overlayfs": ["-o", place.options, place.merged],
    }[module]
    command = [sys.executable, "-c", _SLOW.format(module), SOURCE, number, *words]
    done = subprocess.run(
        [sys.executable, "-c", _PARENT, str(SOURCE), *map(str, command)], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=30, check=False, env={**os.environ, "OVERT_SERVER": ""},
    )  # fmt: skip
    assert done.stderr == ""
    status, *left = map(int, done.stdout.split())
    assert status == (130 if number == signal.SIGINT else -number)
    assert left == [1]
    assert not registry.is_mount(str(place.merged))
    assert not [entry for entry in registry.entries() if entry.target == str(place.merged)]
    place.mount()


def test_nor_does_a_shared_server_keep_it(place: Place) -> None:
    socket = place.base / "socket"
    server = start(str(socket))
    try:
        with Client(socket) as client:
            asked = {"do": "mount", "target": str(place.merged), "options": parse(place.options)._asdict()}
            client._socket.sendall(json.dumps(asked).encode() + b"\n")
        with Client(socket) as other:
            deadline = time.monotonic() + 20
            while not other.status()["events"].get("unmounted"):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert not registry.is_mount(str(place.merged))
        place.mount()
    finally:
        assert server.stop() == 0


def test_ctrl_c_while_unmounting_has_no_traceback(place: Place) -> None:
    program = """if True:
        import sys
        sys.path.insert(0, sys.argv.pop(1))
        from overt.cli import umount_helper
        def interrupted(*_):
            raise KeyboardInterrupt
        umount_helper._umount = interrupted
        umount_helper.main()"""
    done = subprocess.run(
        [sys.executable, "-c", program, SOURCE, place.merged], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_broken_pipe_of_another_kind_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only that nobody hears the answer is no news to anybody."""

    def serve(*_: object, **__: object) -> int:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE), "watchdog")

    monkeypatch.setattr(background, "_serve", serve)
    assert background.in_background(parse("lowerdir=/"), "/nowhere") == 1
    assert capfd.readouterr().err == "overt: Broken pipe: watchdog\n"


def test_one_that_comes_later_is_told_too(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def serve(options: object, target: str, place: str, report: Callable[..., None], **_: object) -> int:
        monkeypatch.setattr(background, "_let_go_of_terminal", lambda: None)
        report({"notices": [], "target": target})
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE), "watchdog")

    monkeypatch.setattr(background, "_serve", serve)
    assert background.in_background(parse("lowerdir=/"), "/nowhere") == 0
    os.wait()
    assert "BrokenPipeError: [Errno 32] Broken pipe: 'watchdog'" in capfd.readouterr().err
