"""What holds for every test: a private place, an end, and nothing left behind.

A private place. As root the session unshares its mount namespace, so that no mount of a test is seen outside and all go
with the last process. It unshares the UTS namespace too, as a mark: nothing here changes the host name, and every
process that a test starts carries the namespace through fork, exec, setsid and further unshares of the mount namespace.
(A variable in the environment is lost by fork without exec, a process group by a daemon.)

An end. pytest-timeout interrupts a test with a signal. That needs the interpreter: a thread that waits for its own FUSE
mount with the GIL held never gets there. So a second deadline, in faulthandler's C thread, prints the stacks and ends
the session; the kernel then aborts the FUSE connections that only the session held.

Nothing left behind. Mounts, processes and loop devices are compared with those at the start, and what is left fails the
session, with the name of the test after which it was first seen. Loop devices belong to the whole machine, where others
may be at work: one that a process outside the session uses is theirs.
"""

import ctypes
import faulthandler
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
MS_REC = 1 << 14
MS_PRIVATE = 1 << 18

GRACE = 10.0  # seconds for servers, AUTOCLEAR loop devices and lazily detached mounts to go by themselves


def enter_private_namespaces() -> str | None:
    """Unshare, and return None, or why that was not possible."""
    if os.geteuid() != 0:
        return "not root"
    libc = ctypes.CDLL(None, use_errno=True)
    # Made private: on most systems / is shared, and what is mounted here would appear outside.
    if libc.unshare(CLONE_NEWNS | CLONE_NEWUTS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
        return f"no mount namespace: {os.strerror(ctypes.get_errno())}"
    return None


def mounts() -> set[str]:
    found = set()
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        left, right = line.split(" - ", 1)
        found.add(f"mount on {left.split()[4]} ({' '.join(right.split()[:2])})")
    return found


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def is_ours(pid: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/ns/uts") == os.readlink("/proc/self/ns/uts")
    except OSError:  # it has gone meanwhile, or is a zombie
        return False


def processes() -> set[str]:
    found = set()
    for pid in all_pids():
        if pid != os.getpid() and is_ours(pid):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            found.add(f"process {pid} ({command.strip()[:120]})")
    return found


def loop_devices() -> set[str]:
    found = set()
    for name in os.listdir("/sys/block"):
        if name.startswith("loop"):
            try:
                backing = Path(f"/sys/block/{name}/loop/backing_file").read_text().strip()
            except OSError:  # not attached
                continue
            found.add(f"loop device {name} on {backing}")
    return found


def used_by_others(loop: str) -> bool:
    """Whether a process outside the session has this device (an item of loop_devices()) mounted or open."""
    name = loop.split()[2]
    try:
        number = Path(f"/sys/block/{name}/dev").read_text().strip()
    except OSError:
        return False
    for pid in all_pids():
        if is_ours(pid):
            continue
        try:
            mountinfo = Path(f"/proc/{pid}/mountinfo").read_text(errors="replace")
            if f" {number} " in mountinfo or f" /dev/{name} " in mountinfo:
                return True
            fds = f"/proc/{pid}/fd"
            if any(os.readlink(f"{fds}/{fd}") == f"/dev/{name}" for fd in os.listdir(fds)):
                return True
        except OSError:  # it has gone meanwhile
            continue
    return False


class Leaks:
    """What is there that was not there when the session began."""

    kinds: tuple[Callable[[], set[str]], ...] = (mounts, processes, loop_devices)

    def __init__(self) -> None:
        self.at_start = self.present()
        self.first_seen: dict[str, str] = {}
        self.left: list[str] = []

    def present(self) -> set[str]:
        return set().union(*(kind() for kind in self.kinds))

    def look(self, nodeid: str) -> None:
        for thing in self.present() - self.at_start:
            self.first_seen.setdefault(thing, nodeid)

    def settle(self) -> None:
        """Wait until nothing is left, or GRACE has passed."""
        deadline = time.monotonic() + GRACE
        while True:
            new = self.present() - self.at_start
            self.left = sorted(thing for thing in new if not (thing.startswith("loop") and used_by_others(thing)))
            if not self.left or time.monotonic() > deadline:
                return
            time.sleep(0.2)


class Session:
    """The hooks that need what was set up at the start."""

    def __init__(self) -> None:
        self.why_not = enter_private_namespaces()
        self.leaks = None if self.why_not else Leaks()
        self.stderr = os.dup(2)  # the real one: during a test 2 is captured

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        marker = item.get_closest_marker("timeout")
        limit = float(marker.args[0] if marker and marker.args else item.config.getini("timeout"))
        faulthandler.dump_traceback_later(2 * limit + 30, exit=True, file=self.stderr)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            if self.leaks:
                self.leaks.look(item.nodeid)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.why_not and item.get_closest_marker("root"):
            pytest.skip(f"needs root: {self.why_not}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.leaks:
            self.leaks.settle()
            if self.leaks.left:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.leaks and self.leaks.left:
            terminalreporter.section("left behind", red=True)
            for thing in self.leaks.left:
                terminalreporter.line(f"{thing}, after {self.leaks.first_seen.get(thing, 'the last test')}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Session(), "overt-session")


def pytest_report_header() -> str:
    return f"kernel {os.uname().release}, uid {os.geteuid()}"
