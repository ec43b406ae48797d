"""Servers, what they leave where others see it, and device numbers that are another mount's a moment later."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overt.host import process
from overt.host.libc import libc
from overt.server import registry, watchdog

from .ground import Layers, as_user


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


# Where they are found

SOMEBODY, STRANGER = 61001, 61002
PR_SET_DUMPABLE = 4


@pytest.fixture
def world() -> Iterator[Path]:
    """A directory like /tmp."""
    place = Path(tempfile.mkdtemp(prefix="overt-world-", dir="/tmp"))
    place.chmod(0o1777)
    try:
        yield place
    finally:
        shutil.rmtree(place)


def directory_of(uid: int, runtime: Path) -> str:
    """What `registry.directory` says to a user with this XDG_RUNTIME_DIR."""

    def ask() -> str:
        os.environ["XDG_RUNTIME_DIR"] = str(runtime)
        return str(registry.directory())

    return str(as_user(uid, ask))


def test_what_a_stranger_has_put_where_a_registry_would_be_is_not_believed(world: Path) -> None:
    (world / "overt").mkdir(mode=0o777)
    (world / "overt" / "7:0.1.1").write_text("/")
    os.chown(world / "overt", STRANGER, STRANGER)
    with pytest.raises(PermissionError, match="belongs to another user"):
        directory_of(SOMEBODY, world)


def test_nor_what_a_link_leads_to(world: Path) -> None:
    (world / "own").mkdir()
    os.chown(world / "own", SOMEBODY, SOMEBODY)
    (world / "overt").symlink_to("own")
    os.chown(world / "overt", STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(PermissionError, match="belongs to another user"):
        directory_of(SOMEBODY, world)


def test_a_link_of_ones_own_is_no_directory(world: Path) -> None:
    (world / "own").mkdir()
    (world / "overt").symlink_to("own")
    for path in (world / "own", world / "overt"):
        os.chown(path, SOMEBODY, SOMEBODY, follow_symlinks=False)
    with pytest.raises(NotADirectoryError, match=r"is not a directory .*: remove it"):
        directory_of(SOMEBODY, world)


@pytest.mark.parametrize("runtime", ["", "run", None])
@pytest.mark.parametrize("apart", [False, True])
def test_without_a_runtime_directory_each_user_has_his_own_in_tmp(apart: bool, runtime: str | None) -> None:
    """In a user namespace, in which everybody is root, too."""

    def ask() -> str:
        if runtime is None:
            os.environ.pop("XDG_RUNTIME_DIR", None)
        else:
            os.environ["XDG_RUNTIME_DIR"] = runtime
        if apart:
            libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
            process.unshare(process.CLONE_NEWUSER)
            Path("/proc/self/uid_map").write_text(f"0 {SOMEBODY} 1")
            assert os.geteuid() == 0
        return str(registry.directory())

    place = Path(f"/tmp/overt-{SOMEBODY}")
    try:
        assert as_user(SOMEBODY, ask) == f"{place}/overt"
        assert os.stat(place).st_uid == SOMEBODY
    finally:
        shutil.rmtree(place, ignore_errors=True)


def test_nor_what_is_in_a_directory_of_ones_own_that_others_can_write_to(world: Path) -> None:
    for mode in (0o777, 0o1777, 0o770):
        (world / "overt").mkdir()
        (world / "overt").chmod(mode)
        os.chown(world / "overt", SOMEBODY, SOMEBODY)
        with pytest.raises(PermissionError, match="others can write"):
            directory_of(SOMEBODY, world)
        (world / "overt").rmdir()


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_nor_what_others_could_put_in_its_place(world: Path, mode: int) -> None:
    """Where names are not kept from others it is refused; where only the directory's own owner could, it is his."""
    world.chmod(mode)
    os.chown(world, *(STRANGER, STRANGER) if mode == 0o1777 else (0, 0))
    with pytest.raises(PermissionError):
        directory_of(SOMEBODY, world)
    assert os.listdir(world) == []


def test_what_one_makes_oneself_where_others_have_theirs_is_good(world: Path) -> None:
    for uid, runtime in ((SOMEBODY, world), (STRANGER, world / "run")):
        made = directory_of(uid, runtime)
        assert (os.stat(made).st_uid, os.stat(made).st_mode & 0o777) == (uid, 0o700)
        assert directory_of(uid, runtime) == made
    with pytest.raises(PermissionError):
        directory_of(STRANGER, world)


def test_a_server_whose_socket_is_not_to_be_seen_here_keeps_its_mounts(layers: Layers, world: Path) -> None:
    """It is in another mount namespace, say; and what it serves is taken away only when it is dead."""
    place = world / "visible"
    place.mkdir()
    server = subprocess.Popen([sys.executable, "-m", "overt", "serve", "--foreground", "--socket", str(place / "s")])
    try:
        deadline = time.monotonic() + 30
        while not registry.answers(place / "s"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        mount = ["mount", "--server", str(place / "s"), "-o", layers.words, str(layers.path)]
        subprocess.run([sys.executable, "-m", "overt", *mount], check=True, timeout=30)
        place.rename(world / "elsewhere")
        assert str(layers.path) not in registry.clear_dead()
        (layers.path / "file").write_text("here")
        server.kill()
        server.wait(30)
        assert str(layers.path) in registry.clear_dead()
        assert not registry.is_mount(str(layers.path))
    finally:
        server.kill()
        server.wait(30)
        registry.clear_dead()


def test_a_server_that_has_no_mounts_ends_at_once(world: Path) -> None:
    server = subprocess.Popen([sys.executable, "-m", "overt", "serve", "--foreground", "--socket", str(world / "s")])
    try:
        while not registry.answers(world / "s"):
            time.sleep(0.02)
        begin = time.monotonic()
        server.terminate()
        assert server.wait(30) == 0
        assert time.monotonic() - begin < 2.5, "it waited for the kernel to let go of mounts, of which there are none"
    finally:
        server.kill()
        server.wait(30)
