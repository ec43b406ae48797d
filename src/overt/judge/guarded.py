"""The kernel's overlayfs in containers whose syncfs(2) an `overt guard` answers.

A container here has no runtime. Its process does what one does for it (seccomp_unotify(2)): it installs a filter that
notifies of syncfs(2), and sends the listener and the container process state of the OCI runtime specification to the
guard's socket. One that joins later would do the same. No other call is touched.
"""

import ctypes
import json
import os
import platform
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from overt.guard import supervisor
from overt.host.libc import syscall
from overt.judge.systems import PATIENCE, Kernel, Layers, Refused
from overt.wire import seccomp

_NATIVE = {
    "x86_64": (seccomp.AUDIT_ARCH_X86_64, 306),
    "aarch64": (seccomp.AUDIT_ARCH_AARCH64, 267),
}.get(platform.machine())
"""syncfs(2) as this machine's own programs call it"""

_CODE = struct.Struct("=HBBI")  # struct sock_filter, <linux/filter.h>
_PROGRAM = struct.Struct("@HP")  # struct sock_fprog
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
_NR, _ARCH = 0, 4  # in struct seccomp_data


class Guarded(Kernel):
    """See above. One guard serves all containers of a cell."""

    outlives = True

    def missing(self) -> str | None:
        if _NATIVE is None:
            return f"not on {platform.machine()}"
        return super().missing()

    def version(self) -> str:
        from overt import __version__

        return f"overt {__version__}, {super().version()}"

    @contextmanager
    def serve(self, place: str) -> Iterator[None]:
        self._path = Path(place, "guard")
        guard = self._start(Path(place, "log"))
        try:
            yield
        finally:
            guard.send_signal(signal.SIGTERM)
            try:
                guard.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                guard.kill()
                guard.wait()

    def _start(self, log: Path) -> "subprocess.Popen[bytes]":
        ready, tell = os.pipe()
        try:
            with open(log, "ab") as output:
                guard = subprocess.Popen(
                    [sys.executable, "-m", "overt", "guard", "run", "-f", "--socket", self._path, "--ready-fd",
                     str(tell)],
                    pass_fds=[tell], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=output,
                )  # fmt: skip
        finally:
            os.close(tell)
        try:
            if not select.select([ready], [], [], PATIENCE)[0] or not os.read(ready, 1):
                guard.kill()
                guard.wait()
                said = log.read_text("utf-8", "replace").strip()[-200:]
                raise Refused(f"no guard: {said}")
        finally:
            os.close(ready)
        return guard

    def door(self) -> int:
        """A connection to the guard."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(os.fspath(self._path))
            return connection.detach()

    def admit(self, layers: Layers) -> None:
        """Wait until the guard has looked at the container's overlay: errors count from there."""
        deadline = time.monotonic() + PATIENCE
        while not any(each["upperdir"] == layers.upper and each["guarded"] for each in self._overlays()):
            if time.monotonic() > deadline:
                raise Refused(f"the guard has not taken the container in {PATIENCE:g} s")
            time.sleep(0.005)

    def _overlays(self) -> list[dict[str, Any]]:
        with suppress(OSError):  # its worker has ended, and another comes
            state: dict[str, Any] = supervisor.ask(self._path)
            return list(state["overlays"])
        return []

    def kill(self) -> None:
        """Kill the worker, which answers; the supervisor, which holds the listeners and answers nothing, stays."""
        state: dict[str, Any] = supervisor.ask(self._path)
        os.kill(state["worker"], signal.SIGKILL)


def bring_in(door: int) -> None:
    """Have the guard behind `door` (closed here) answer this process's syncfs(2) from now on. OSError."""
    with socket.socket(fileno=door) as connection:
        listener = _listen()
        pid = os.getpid()
        state = {
            "ociVersion": "1.0.2", "fds": ["seccompFd"], "pid": pid,
            "state": {"ociVersion": "1.0.2", "id": f"judge-{pid}", "status": "creating", "pid": pid, "bundle": "/"},
        }  # fmt: skip
        try:
            socket.send_fds(connection, [json.dumps(state).encode()], [listener])
        finally:
            os.close(listener)


def _listen() -> int:
    """Install the filter for this thread; its listener (seccomp(2), SECCOMP_FILTER_FLAG_NEW_LISTENER)."""
    assert _NATIVE is not None
    arch, number = _NATIVE
    lines = (
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_IF_EQUAL, 0, 3, arch),
        (_LOAD, 0, 0, _NR),
        (_JUMP_IF_EQUAL, 0, 1, number),
        (_RETURN, 0, 0, seccomp.SECCOMP_RET_USER_NOTIF),
        (_RETURN, 0, 0, seccomp.SECCOMP_RET_ALLOW),
    )
    code = ctypes.create_string_buffer(b"".join(_CODE.pack(*line) for line in lines))
    program = _PROGRAM.pack(len(lines), ctypes.addressof(code))
    mode, flags = seccomp.SECCOMP_SET_MODE_FILTER, seccomp.SECCOMP_FILTER_FLAG_NEW_LISTENER
    fd = syscall("seccomp", mode, flags, program)
    os.set_inheritable(fd, False)
    return fd
