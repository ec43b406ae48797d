"""The guard's parts by themselves: what outlives a worker, who is whom, and profiles."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from struct import pack_into
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overt.guard import container, descriptions, engines, install, profile, table
from overt.guard.change import Change
from overt.guard.descriptions import Held
from overt.guard.slots import Slots
from overt.guard.store import Keeper, Store
from overt.host import files
from overt.ledger import Description

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
    for fd in entry.fds:
        with pytest.raises(OSError):
            os.fstat(fd)


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
    assert sorted(map(int, held.prune(set()))) == list(range(50))


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


# Installing


def test_a_bundle_is_taken_back_whole(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"ociVersion": "1.0.2",  "linux": {}}')
    changes = install.into_bundle(tmp_path, "/run/g")
    assert config.read_text().count("seccomp") == 0  # nothing is done yet
    for change in changes:
        change.make()
    assert json.loads(config.read_text())["linux"]["seccomp"]["listenerPath"] == "/run/g"
    assert install.into_bundle(tmp_path, "/run/g") == []
    for change in install.out_of_bundle(tmp_path):
        change.make()
    assert os.listdir(tmp_path) == ["config.json"]
    assert config.read_text() == '{"ociVersion": "1.0.2",  "linux": {}}'
    with pytest.raises(FileNotFoundError):
        install.out_of_bundle(tmp_path)


def test_podmans_profile_is_made_from_the_one_in_use_and_taken_back_whole(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({**profile.MINIMAL, "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_ERRNO"}]}))
    (tmp_path / "containers.conf").write_text(f'[containers]\nseccomp_profile = "{own}"\n')
    for _ in range(2):  # the second time it is made from the same one, not from ours
        for change in install.into_podman(tmp_path, "/run/g"):
            change.make()
    made = json.loads((tmp_path / "overt-guard.json").read_text())
    assert [rules(made, name) for name in ("mount", "syncfs")] == [["SCMP_ACT_ERRNO"], ["SCMP_ACT_NOTIFY"]]
    for change in install.out_of_podman(tmp_path):
        change.make()
    assert sorted(os.listdir(tmp_path)) == ["containers.conf", "containers.conf.d", "own.json"]
    assert install.out_of_podman(tmp_path) == []


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"ociVersion": "1.0.2", "linux": {}}')
    words = ["guard", "install", "bundle", str(tmp_path), "--dry-run", "--socket", "/run/g"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "overt", *words], capture_output=True, text=True, timeout=30, check=True, env=environment
    )
    assert done.stdout.count("would write") == 2
    assert os.listdir(tmp_path) == ["config.json"]


# Docker and containerd


@pytest.fixture
def wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[engines.Wrapped]:
    """With programs of these names on the PATH."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in (engines.PROGRAM, "runc", "crun"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    yield engines.Wrapped("/run/g", None)


def files_of(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir() if path.is_file()}


def make(changes: list[Change]) -> None:
    for change in changes:
        change.make()


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        None, "{}", '{ "log-level":"warn" }', '{"runtimes": {"x": {"path": "crun"}},\n"default-runtime": "x"}',
        '{"runtimes": {}}',
    ],
)  # fmt: skip
def test_dockers_configuration_is_taken_back_whole(
    tmp_path: Path, wrapper: engines.Wrapped, text: str | None, default: bool
) -> None:
    path = tmp_path / "daemon.json"
    if text is not None:
        path.write_text(text)
    for each in (not default, default):  # the second time it is made from the original
        make(engines.into_docker(tmp_path, wrapper, default=each))
    assert engines.into_docker(tmp_path, wrapper, default=default) == []
    made, was = json.loads(path.read_text()), json.loads(text or "{}")
    ours = made["runtimes"].pop("overt")
    assert ours["path"].endswith("/overt-runc")
    assert ours["runtimeArgs"][-1] == str(tmp_path / "programs" / ("crun" if "crun" in str(text) else "runc"))
    assert made.get("default-runtime") == ("overt" if default else was.get("default-runtime"))
    make(engines.out_of_docker(tmp_path))
    assert files_of(tmp_path) == ({} if text is None else {"daemon.json": text})
    assert engines.out_of_docker(tmp_path) == []


def test_what_was_changed_in_dockers_configuration_meanwhile_is_kept(tmp_path: Path, wrapper: engines.Wrapped) -> None:
    path = tmp_path / "daemon.json"
    path.write_text('{"default-runtime": "crun", "runtimes": {"crun": {"path": "crun"}}}')
    make(engines.into_docker(tmp_path, wrapper, default=True))
    whole = json.loads(path.read_text())
    assert whole["runtimes"]["overt"]["runtimeArgs"][-1].endswith("/crun")  # what was the default
    path.write_text(json.dumps({**whole, "debug": True}))
    make(engines.out_of_docker(tmp_path))
    assert files_of(tmp_path).keys() == {"daemon.json"}
    assert json.loads(path.read_text()) == {
        "default-runtime": "crun", "runtimes": {"crun": {"path": "crun"}}, "debug": True
    }  # fmt: skip


SETTINGS = st.dictionaries(
    st.text(min_size=1, max_size=5).filter(lambda key: key not in ("runtimes", "default-runtime")), st.text(max_size=5),
    max_size=3,
)  # fmt: skip
RUNTIMES = st.none() | st.dictionaries(st.sampled_from(["runc", "crun", "x"]), st.just({"path": "crun"}), max_size=2)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    SETTINGS, RUNTIMES, st.none() | st.sampled_from(["runc", "x"]), st.booleans(), st.sampled_from([None, 3]), SETTINGS
)
def test_whatever_is_in_dockers_configuration_is_there_after_uninstalling(
    wrapper: engines.Wrapped, whole: dict[str, Any], runtimes: dict[str, Any] | None, used: str | None, default: bool,
    indent: int | None, later: dict[str, str],
) -> None:  # fmt: skip
    whole = {**whole, **({} if runtimes is None else {"runtimes": runtimes})}
    whole |= {} if used is None else {"default-runtime": used}
    with tempfile.TemporaryDirectory() as name:
        directory, path = Path(name), Path(name, "daemon.json")
        path.write_text(json.dumps(whole, indent=indent))
        before = path.read_text()
        make(engines.into_docker(directory, wrapper, default=default))
        make(engines.out_of_docker(directory))
        assert files_of(directory) == {"daemon.json": before}
        make(engines.into_docker(directory, wrapper, default=default))
        path.write_text(json.dumps({**json.loads(path.read_text()), **later}))  # somebody else, meanwhile
        make(engines.out_of_docker(directory))
        assert json.loads(path.read_text()) == {**whole, **later}


def test_a_link_to_a_configuration_elsewhere_stays_one(tmp_path: Path, wrapper: engines.Wrapped) -> None:
    (tmp_path / "elsewhere.json").write_text("{}")
    (tmp_path / "daemon.json").symlink_to("elsewhere.json")
    make(engines.into_docker(tmp_path, wrapper, default=False))
    assert "overt" in (tmp_path / "elsewhere.json").read_text()
    make(engines.out_of_docker(tmp_path))
    assert os.readlink(tmp_path / "daemon.json") == "elsewhere.json"
    assert (tmp_path / "elsewhere.json").read_text() == "{}"


V2 = """version = 2
# a comment
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  pod_annotations = ["a.*"]
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
    SystemdCgroup = true
    BinaryName = "crun"
"""
V3 = """version = 3
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
    SystemdCgroup = true
    BinaryName = "crun"
# no newline"""


@pytest.mark.parametrize(
    ("text", "plugin"),
    [
        (None, "io.containerd.grpc.v1.cri"), ("version = 2", "io.containerd.grpc.v1.cri"),
        (V2, "io.containerd.grpc.v1.cri"), (V3, "io.containerd.cri.v1.runtime"),
    ],
)  # fmt: skip
def test_containerds_configuration_is_added_to_and_taken_back_whole(
    tmp_path: Path, wrapper: engines.Wrapped, text: str | None, plugin: str
) -> None:
    path = tmp_path / "config.toml"
    if text is not None:
        path.write_text(text)
    for _ in range(2):
        make(engines.into_containerd(tmp_path, wrapper))
    assert engines.into_containerd(tmp_path, wrapper) == []
    assert path.read_text().startswith(text or "")
    runtimes = tomllib.loads(path.read_text())["plugins"][plugin]["containerd"]["runtimes"]
    assert runtimes["runc"]["runtime_type"] == "io.containerd.runc.v2"
    script = tmp_path / "overt-runc"
    expected = {"runtime_type": "io.containerd.runc.v2", "options": {"BinaryName": str(script)}}
    if text in (V2, V3):
        expected = {**runtimes["runc"], "options": {"SystemdCgroup": True, "BinaryName": str(script)}}
    assert runtimes["overt"] == expected
    runtime = "crun" if text in (V2, V3) else "runc"
    assert f"--guard-socket /run/g --guard-runtime {tmp_path}/programs/{runtime} " in script.read_text()
    assert os.access(script, os.X_OK)
    make(engines.out_of_containerd(tmp_path))
    assert files_of(tmp_path) == ({} if text is None else {"config.toml": text})
    assert engines.out_of_containerd(tmp_path) == []


def test_what_was_added_to_containerds_configuration_meanwhile_is_kept(
    tmp_path: Path, wrapper: engines.Wrapped
) -> None:
    make(engines.into_containerd(tmp_path, wrapper))
    path = tmp_path / "config.toml"
    path.write_text(path.read_text() + "[debug]\nlevel = 'info'\n")
    assert engines.into_containerd(tmp_path, wrapper._replace(socket="/run/other"))
    make(engines.out_of_containerd(tmp_path))
    assert files_of(tmp_path) == {"config.toml": "version = 2\n[debug]\nlevel = 'info'\n"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "version 1 is not known"),
        ("no", "config.toml"),
        ("version = 2\nplugins = {}", "config.toml"),
        ('version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.overt]', "not ours"),
        (V2.replace("runc.v2", "runc.v1"), "runtime_type is io.containerd.runc.v1"),
    ],
)
def test_a_configuration_that_cannot_be_added_to_is_refused(
    tmp_path: Path, wrapper: engines.Wrapped, text: str, why: str
) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(engines.InstallError, match=why):
        engines.into_containerd(tmp_path, wrapper)
    (tmp_path / "daemon.json").write_text("[]")
    with pytest.raises(engines.InstallError, match=r"daemon\.json: not an object"):
        engines.into_docker(tmp_path, wrapper, default=False)


def test_a_runtime_that_is_not_installed_is_named(tmp_path: Path, wrapper: engines.Wrapped) -> None:
    with pytest.raises(engines.InstallError, match="not on the PATH: youki"):
        engines.into_docker(tmp_path, wrapper._replace(runtime="youki"), default=False)
