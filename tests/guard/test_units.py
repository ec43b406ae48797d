"""The guard's parts by themselves: what outlives a worker, who is whom, and profiles."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from struct import pack_into
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overt.guard import container, descriptions, profile, table
from overt.guard.descriptions import Held
from overt.guard.slots import Slots
from overt.guard.store import Keeper, Store
from overt.host import files
from overt.ledger import Description

from .ground import wait_until

DEBIAN = Path("/usr/share/containers/seccomp.json")


def write(slots: Slots, slot: int, number: int, tid: int) -> None:
    """What the kernel does."""
    at = slots.address(slot) - slots.address(0) + 16
    pack_into("=QIIiIQQ", slots._memory, at, number, tid, 0, 306, 0xC000003E, 0, (1 << 32) + 7)


def test_a_call_in_a_slot_outlives_a_worker_that_is_killed() -> None:
    slots = Slots(8)
    pid = os.fork()
    if pid == 0:
        try:
            first, second, third = (slots.take(7) for _ in range(3))
            for slot in (first, second, third):
                write(slots, slot, 1000 + slot, 55)
            slots.telling(third, 5)
            slots.free(second)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert list(slots.left()) == [(0, 7, 0, 1), (2, 7, 5, 1)]
    call = slots.read(2)
    assert (call.id, call.tid, call.argument) == (1002, 55, 7)
    assert list(slots.left()) == [(0, 7, 0, 2), (2, 7, 5, 2)]
    assert sorted(slots.take(9) for _ in range(7)) == [-1, 1, 3, 4, 5, 6, 7]


def test_a_slot_that_was_freed_is_empty_and_used_again() -> None:
    slots = Slots(1)
    assert slots.take(3) == 0
    write(slots, 0, 9, 9)
    slots.free(0)
    assert slots.take(4) == 0
    assert slots.read(0).id == 0
    assert slots.take(4) == -1


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_what_a_worker_has_put_is_there_after_its_death(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    pid = os.fork()
    if pid == 0:
        try:
            Keeper(theirs).put("overlay/1", {"told": 3}, [os.open("/", os.O_RDONLY), 0])
            Keeper(theirs).put("owed/1", 5)
            Keeper(theirs).drop("owed/1")
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    theirs.close()
    store = Store()
    while store.hear(ours):
        pass
    assert list(store.entries) == ["overlay/1"]
    entry = store.entries["overlay/1"]
    assert entry.value == {"told": 3}
    assert os.readlink(f"/proc/self/fd/{entry.fds[0]}") == "/"
    store.put("overlay/1", None, [])
    wait_until(lambda: not any(os.path.exists(f"/proc/self/fd/{fd}") for fd in entry.fds), "they are closed", 5)


@given(st.binary(max_size=300))
def test_whatever_comes_as_a_process_state_is_read_or_a_value_error(data: bytes) -> None:
    try:
        container.parse(data)
    except ValueError as error:
        assert "container process state" in str(error)


def test_a_process_state_as_the_runtime_specification_has_it() -> None:
    said = {
        "ociVersion": "1.0.2", "fds": ["other", "seccompFd"], "pid": 4422, "metadata": "m",
        "state": {"ociVersion": "1.0.2", "id": "c", "status": "creating", "pid": 4422, "bundle": "/b"},
    }  # fmt: skip
    assert container.parse(json.dumps(said).encode()) == container.State("c", 4422, "/b", "m", 1)


def test_descriptions_are_found_among_many_by_any_descriptor_of_theirs() -> None:
    held = Held()
    fds = [os.open("/", os.O_RDONLY) for _ in range(50)]
    for number, fd in enumerate(fds):
        assert held.add(os.dup(fd), Description(number), str(number))
    duplicate = os.dup(fds[0])
    assert not held.add(duplicate, Description(0), "again")
    for number, fd in enumerate(fds):
        at, there = held.find(os.getpid(), fd)
        assert there and held.entries[at][1].since == number
    other = os.open("/", os.O_RDONLY)
    assert not held.find(os.getpid(), other)[1]
    with pytest.raises(OSError):
        held.find(os.getpid(), 99999)
    for fd in (*fds, other, duplicate):
        os.close(fd)
    assert held.prune(set()) == []
    gone = held.prune(set())
    assert sorted(int(name) for _, name in gone) == list(range(50))
    for fd, _ in gone:
        os.close(fd)


@pytest.mark.parametrize(
    ("flags", "expected"), [(os.O_RDONLY, False), (os.O_PATH, True), (3, False)], ids=["read", "path", "mode 3"]
)
def test_a_path_descriptor_is_told_from_one_that_reads(tmp_path: Path, flags: int, expected: bool) -> None:
    (tmp_path / "file").write_text("")
    fd = os.open(tmp_path / "file", flags)
    try:
        assert descriptions.is_path(b"/proc/self/fd/%d" % fd) is expected
    finally:
        os.close(fd)


def test_a_mount_is_found_for_a_descriptor_and_none_for_a_pipe(tmp_path: Path) -> None:
    mounts = table.Table()
    directory, pipe = os.open(tmp_path, os.O_RDONLY), os.pipe()
    try:
        found = mounts.mount_of(b"/proc/self/fd/%d" % directory, [os.getpid()])
        assert isinstance(found, table.Mounted) and not found.lies
        assert isinstance(mounts.mount_of(b"/proc/self/fd/%d" % pipe[0], [os.getpid()]), int)
        with pytest.raises(FileNotFoundError):
            mounts.mount_of(b"/proc/self/fd/99999", [os.getpid()])
        assert files.whereabouts(b"/proc/self/fd/%d" % directory) == files.whereabouts(os.fsencode(tmp_path))
    finally:
        for fd in (directory, *pipe):
            os.close(fd)


def test_a_walk_sees_each_descriptor_of_a_process_but_path_ones() -> None:
    fd, path = os.open("/", os.O_RDONLY), os.open("/", os.O_PATH)
    try:
        seen = {number for tid, number, _ in descriptions.walk(set()) if tid == os.getpid()}
        assert fd in seen and path not in seen
        assert not [tid for tid, _, _ in descriptions.walk({os.getpid()}) if tid == os.getpid()]
    finally:
        os.close(fd)
        os.close(path)


# Profiles


def rules(made: dict[str, Any], name: str) -> list[str]:
    return [rule["action"] for rule in made["syscalls"] if name in rule.get("names", [rule.get("name")])]


def test_a_profile_of_the_distribution_keeps_every_rule_but_that_of_syncfs() -> None:
    if not DEBIAN.exists():
        pytest.skip("no /usr/share/containers/seccomp.json (Debian: golang-github-containers-common)")
    base = profile.load(str(DEBIAN))
    made = profile.make(base, "/run/g")
    assert made["listenerPath"] == "/run/g"
    assert rules(made, "syncfs") == ["SCMP_ACT_NOTIFY"]
    everything = {name for rule in base["syscalls"] for name in rule["names"]}
    assert all(rules(made, name) == rules(base, name) for name in everything - {"syncfs"})
    assert profile.make(made, "/run/g")["syscalls"] == made["syscalls"]


def test_a_bundle_without_a_profile_gets_one_that_filters_nothing_else(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"ociVersion": "1.0.2", "linux": {}}))
    made = profile.make(profile.load(str(config)), "/run/g")
    assert made["defaultAction"] == "SCMP_ACT_ALLOW"
    assert made["syscalls"] == [{"names": ["syncfs"], "action": "SCMP_ACT_NOTIFY"}]
    assert "syscalls" not in profile.MINIMAL or not profile.MINIMAL["syscalls"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"architectures": ["SCMP_ARCH_X86_64"]}, "SCMP_ARCH_X86, SCMP_ARCH_X32 would be killed"),
        ({"architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]}, "SCMP_ARCH_X32 would be killed"),
        ({"architectures": []}, "names no architectures"),
        ({"archMap": [{"architecture": "SCMP_ARCH_AARCH64"}]}, "SCMP_ARCH_ARM would be killed"),
        ({"listenerPath": "/other"}, "another agent: /other"),
        ({"syscalls": [{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}]}, "notifies other calls: mount"),
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, "its defaultAction is SCMP_ACT_NOTIFY"),
        ({"syscalls": [5]}, "syscalls is not a list of objects"),
        ({"syscalls": [{"names": 5}]}, "names is not a list of names"),
        ({"syscalls": [{"includes": {"arches": 3}}]}, "arches is not a list of names"),
        ({"syscalls": [{"excludes": {"caps": [3]}}]}, "caps is not a list of names"),
        ({"syscalls": [{"includes": {"minKernel": 4.8}}]}, "a rule's minKernel is not the number of a kernel"),
        ({"syscalls": [{"includes": {"minKernel": "new"}}]}, "a rule's minKernel is not the number of a kernel"),
        ({"syscalls": [{"name": {}}]}, "a rule's name is not a name"),
        ({"architectures": 7}, "architectures is not a list of names"),
        ({"archMap": [{}]}, "a row without an architecture"),
        ({"archMap": {}, "listenerPath": 5}, "listenerPath is not a path"),
    ],
)
def test_a_profile_that_would_do_harm_is_refused_with_the_reason(change: dict[str, Any], why: str) -> None:
    with pytest.raises(profile.ProfileError, match=why):
        profile.make({**profile.MINIMAL, **change}, "/run/g")


def test_a_relative_socket_and_a_file_that_is_no_profile_are_refused(tmp_path: Path) -> None:
    with pytest.raises(profile.ProfileError, match="absolute"):
        profile.make(profile.MINIMAL, "guard.sock")
    for text in ("{}", "[]", "no", '{"ociVersion": "1", "linux": []}'):
        (tmp_path / "file").write_text(text)
        with pytest.raises(profile.ProfileError, match="not a seccomp profile"):
            profile.load(str(tmp_path / "file"))
