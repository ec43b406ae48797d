"""A thousand listeners: processes with a filter of their own on overlays of their own, without a runtime."""

import ctypes
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overt.host import files, mounts, process
from overt.host.libc import check, libc

from .ground import EIO, Ground, fail, wait_until

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

MIB = 1 << 20
_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER = 317, 1, 8
_PR_SET_NO_NEW_PRIVS = 38
# Load the number; if it is syncfs's, SECCOMP_RET_USER_NOTIF, else SECCOMP_RET_ALLOW. (linux/filter.h, linux/seccomp.h)
_PROGRAM = b"".join(
    struct.pack("=HBBI", *line)
    for line in ((0x20, 0, 0, 0), (0x15, 0, 1, 306), (0x06, 0, 0, 0x7FC00000), (0x06, 0, 0, 0x7FFF0000))
)


def filter_syncfs() -> int:
    """Have this process's syncfs(2) notified; the listener."""
    room = ctypes.create_string_buffer(_PROGRAM)
    program = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", 4, ctypes.addressof(room)))
    check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    return check(libc.syscall(ctypes.c_long(_SECCOMP), _SET_MODE_FILTER, _NEW_LISTENER, program))


class Lone:
    """A process that is all of a container that matters here: a mount namespace, an overlay, a filter."""

    def __init__(self, ground: Ground, number: int) -> None:
        upper, work = (Path(ground.disk.path, f"{kind}-{number}") for kind in ("upper", "work"))
        upper.mkdir()
        work.mkdir()
        options: list[tuple[str, str | int | None]] = [
            ("lowerdir", str(ground.lower)), ("upperdir", str(upper)), ("workdir", str(work)),
        ]  # fmt: skip
        overlay = mounts.new_mount("overlay", options)
        self.go, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._live(ground, number, overlay, inside)
            finally:
                os._exit(0)
        inside.close()
        os.close(overlay)

    def _live(self, ground: Ground, number: int, overlay: int, inside: socket.socket) -> None:
        process.die_with_parent(signal.SIGKILL)
        for fd in range(3, inside.fileno() + 1):
            if fd not in (overlay, inside.fileno()):
                os.closerange(fd, fd + 1)  # the other containers' above all
        process.unshare(process.CLONE_NEWNS)
        mounts.make_private()
        mounts.attach(overlay, "/mnt")
        os.close(overlay)
        fd = os.open("/mnt", os.O_RDONLY)
        listener = filter_syncfs()
        state = {"fds": ["seccompFd"], "pid": os.getpid(), "state": {"id": f"lone-{number}", "bundle": "/"}}
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as runtime:
            runtime.connect(str(ground.base / "guard"))
            socket.send_fds(runtime, [json.dumps(state).encode()], [listener])
        os.close(listener)
        inside.send(b"ready")
        while inside.recv(1):
            try:
                files.syncfs(fd)
                code = 0
            except OSError as error:
                code = error.errno or -1
            inside.send(struct.pack("=id", code, time.monotonic()))

    def answer(self) -> tuple[int, float]:
        """The errno of its call, and when it had it."""
        code, when = struct.unpack("=id", self.go.recv(64))
        return code, when


@pytest.fixture
def lone(guarded: Ground, request: pytest.FixtureRequest) -> Iterator[list[Lone]]:
    made: list[Lone] = []
    try:
        for number in range(request.param):
            made.append(Lone(guarded, number))
        for each in made:
            assert each.go.recv(16) == b"ready"
        yield made
    finally:
        for each in made:
            os.kill(each.pid, signal.SIGKILL)
            os.waitpid(each.pid, 0)
            each.go.close()


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
        begun = time.monotonic()
        for each in lone:
            each.go.send(b"!")
        answers = [each.answer() for each in lone]
        assert [code for code, _ in answers] == [expected] * len(lone)
        spent = max(when for _, when in answers) - begun
        now = guard.status()["uppers"][0]["flushes"]
        print(f"{len(lone)} at once, errno {expected}: {now - flushes} flushes, all answered in {spent * 1000:.0f} ms")
        flushes = now
    print(f"resident: supervisor {memory[0]:.0f} MiB, worker {memory[1]:.0f} MiB")
    assert guard.status()["crashes"] == 0
