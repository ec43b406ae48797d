"""Servers, what they leave where others see it, and device numbers that are another mount's a moment later."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from overt.server import registry, watchdog

from .ground import Layers


def test_neither_process_stays_in_the_directory_where_the_command_was_given(layers: Layers) -> None:
    """Its filesystem could not be unmounted until the last of them had ended."""
    options = ["-o", layers.words, str(layers.path)]
    subprocess.run([sys.executable, "-m", "overt", "mount", *options], cwd=layers.upper, check=True, timeout=30)
    try:
        server = next(entry.pid for entry in registry.entries() if entry.target == str(layers.path))
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        assert children, "the watchdog"
        assert [os.readlink(f"/proc/{pid}/cwd") for pid in (server, *children)] == ["/"] * (1 + len(children))
    finally:
        subprocess.run([sys.executable, "-m", "overt", "umount", str(layers.path)], check=True, timeout=30)


def test_a_mount_that_is_reported_gone_late_takes_no_other_out_of_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop device of one that was unmounted is used by the next before the server has heard of it."""
    monkeypatch.setattr(registry, "directory", lambda: tmp_path)
    device = os.makedev(7, 9)
    first = registry.enter(device, "/first")
    registry.enter(device, "/second")
    assert [(entry.device, entry.pid, entry.target) for entry in registry.entries()] == [
        (device, os.getpid(), "/first"), (device, os.getpid(), "/second")
    ]  # fmt: skip
    registry.remove(first)
    registry.remove(first)
    assert [entry.target for entry in registry.entries()] == ["/second"]


def test_nor_from_what_the_watchdog_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    aborted: set[int] = set()
    monkeypatch.setattr(watchdog, "_abort", lambda connections, guarded, pid, say: aborted.update(guarded))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    server, dog = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with server, dog:
        for verb, number in ((b"+", 9), (b"+", 8), (b"+", 9), (b"-", 9), (b"-", 8)):
            server.send(watchdog._MESSAGE.pack(verb, number))
        watchdog._watch(dog, os.getpid(), 0.05, 0.1, print)
    assert aborted == {9}
