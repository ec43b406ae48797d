"""The wrapper in a runtime's place: called as containerd's shim calls it, and what it refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.containers import engine as place

from overt.guard import profile, wrapper

from .ground import EIO, RUNTIMES, SOURCE, Container, Ground

LOG = ("--log", "l", "--log-format", "json")


@pytest.mark.parametrize(
    ("words", "command", "config"),
    [
        ((), "", "config.json"),
        (("--version",), "", "config.json"),
        (("--root", "create", "state", "x"), "state", "config.json"),
        (("--root=/r", *LOG, "create", "--pid-file", "/p", "--bundle", "/b", "x"), "create", "/b/config.json"),
        (("run", "-d", "-b", "b", "x"), "run", "b/config.json"),
        (("--debug", "run", "--bundle=/b", "x"), "run", "/b/config.json"),
        (("--cgroup-manager", "cgroupfs", "create", "-b=/b", "-f", "other.json", "x"), "create", "/b/other.json"),
        (("restore", "--image-path", "i", "--bundle", "/b", "x"), "restore", "/b/config.json"),
        (("exec", "--process", "create", "x"), "exec", "config.json"),
        (("a-new-one", "x"), "a-new-one", "config.json"),
    ],
)  # fmt: skip
def test_a_runtimes_command_line_is_read(words: tuple[str, ...], command: str, config: str) -> None:
    call = wrapper.read(words)
    assert (call.command, call.config) == (command, config)


def test_where_the_command_cannot_be_told_it_is_refused() -> None:
    with pytest.raises(wrapper.WrapperError, match="no command of a runtime's: value"):
        wrapper.read(("--some-new-option", "value", "create", "x"))


def call(tmp_path: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Call it with a runtime that says what it was called with."""
    runtime = tmp_path / "runtime"
    runtime.write_text('#!/bin/sh\necho "$@"\n')
    runtime.chmod(0o755)
    program = tmp_path / "overt-runc"
    place.write_program(program, "guard.wrapper")
    return subprocess.run(
        [program, "--guard-socket=/run/g", "--guard-runtime", runtime, *words], capture_output=True, text=True,
        timeout=30, check=False, cwd=tmp_path,
    )  # fmt: skip


def test_the_runtime_gets_its_arguments_and_the_bundle_a_profile(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"ociVersion": "1", "process": {"a": 1}, "linux": {"seccomp": {
        **profile.MINIMAL, "syscalls": [{"names": ["syncfs", "mount"], "action": "SCMP_ACT_ALLOW"}],
    }}}))  # fmt: skip
    config.chmod(0o600)
    done = call(tmp_path, *LOG, "create", "--bundle", ".", "x")
    assert (done.returncode, done.stdout) == (0, "--log l --log-format json create --bundle . x\n")
    made = json.loads(config.read_text())
    assert made["process"] == {"a": 1}
    assert made["linux"]["seccomp"]["listenerPath"] == "/run/g"
    assert made["linux"]["seccomp"]["syscalls"] == [
        {"names": ["mount"], "action": "SCMP_ACT_ALLOW"}, {"names": ["syncfs"], "action": "SCMP_ACT_NOTIFY"},
    ]  # fmt: skip
    assert config.stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["config.json", "overt-runc", "runtime"]


def test_other_commands_leave_the_bundle_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("whatever")
    assert call(tmp_path, "state", "x").stdout == "state x\n"
    assert (tmp_path / "config.json").read_text() == "whatever"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (None, "No such file or directory"),
        ("no", "not a seccomp profile"),
        ({"architectures": ["SCMP_ARCH_X86_64"]}, "SCMP_ARCH_X86, SCMP_ARCH_X32 would be killed"),
        ({"listenerPath": "/other"}, "its calls are notified to another agent: /other"),
    ],
)
def test_a_container_that_cannot_be_guarded_is_not_started(tmp_path: Path, config: object, why: str) -> None:
    if config is not None:
        seccomp = {**profile.MINIMAL, **config} if isinstance(config, dict) else None
        text = json.dumps({"ociVersion": "1", "linux": {"seccomp": seccomp}}) if seccomp else str(config)
        (tmp_path / "config.json").write_text(text)
    done = call(tmp_path, *LOG, "create", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert why in done.stderr and done.stderr.count("\n") == 1
    (line,) = (tmp_path / "l").read_text().splitlines()  # where containerd's shim looks
    assert why in json.loads(line)["msg"] and json.loads(line)["level"] == "error"
    call(tmp_path, "--log", "l", "create", "x")
    assert "level=error msg=" in (tmp_path / "l").read_text().splitlines()[1]


def test_a_runtime_that_is_not_there_is_named(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "from overt.guard.wrapper import main; main()", "--guard-runtime", "no-such"]
    done = subprocess.run(
        [*words, "state", "x"],
        capture_output=True, text=True, timeout=30, check=False, env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        1, "overt guard: no such runtime: no-such (name it with --guard-runtime)\n"
    )  # fmt: skip


@contextmanager
def wrapped(ground: Ground, runtime: str) -> Iterator[Container]:
    """A container whose bundle says nothing of the guard."""
    program = ground.base / "overt-runc"
    if not program.exists():
        place.write_program(program, "guard.wrapper")
    words = [str(program), "--guard-socket", str(ground.base / "guard"), "--guard-runtime", runtime]
    container = ground.container(
        runtime, program=words, guarded=False,
        mounts=[
            {"destination": path, "source": path, "type": "bind", "options": ["rbind", "ro"]}
            for path in ("/usr", "/lib", "/lib64") if os.path.isdir(path)
        ],
    )  # fmt: skip
    yield container


@pytest.mark.root
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_bundles_without_a_profile_are_guarded_and_so_is_what_joins(guarded: Ground, runtime: str) -> None:
    with wrapped(guarded, runtime) as one, wrapped(guarded, runtime) as other:
        plain = guarded.container(runtime, guarded=False, wait=False)
        old = other.open()
        one.lose()
        assert [one.execute("/usr/bin/sync", "-f", "/") for _ in range(2)] == [1, 0]
        assert [other.syncfs(old), other.new_syncfs(), one.new_syncfs()] == [EIO, 0, 0]
        assert plain.new_syncfs() == 0
