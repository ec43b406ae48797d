"""The wrapper in a runtime's place: called as containerd's shim calls it, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
        (("--debug", "--log-level", "run", "exec", "x", "run"), "exec", "config.json"),
        (("a-new-one", "x"), "a-new-one", "config.json"),
        (("run", "-bundle", "/b", "x"), "run", "/b/config.json"),
        (("run", "-detach", "-bundle=/b", "x"), "run", "/b/config.json"),
        (("run", "--bundle", "/b", "--no-pivot", "--", "x", "-d"), "run", "/b/config.json"),
        (("create", "--new-flag", "--pid-file", "p", "x"), "create", "config.json"),
        (("create", "--bundle", "/b", "--new", "v", "x"), "create", "/b/config.json"),
    ],
)  # fmt: skip
def test_a_runtimes_command_line_is_read(words: tuple[str, ...], command: str, config: str) -> None:
    call = wrapper.read(words)
    assert (call.command, call.config) == (command, config)
    assert call.reads_a_bundle == (command in ("create", "run", "restore"))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--some-new-option", "value", "create", "x"), "the value of an unknown option: value"),
        (("--some-new-option", "exec", "create", "x"), "the value of an unknown option: exec"),
        (("run", "-d", "id", "sh", "--bundle", "/etc"), "may say which bundle: --bundle"),
        (("run", "id", "-bundle=/b"), "may say which bundle: -bundle=/b"),
        (("run", "-b/b", "x"), "may say which bundle: -b/b"),
        (("run", "-db", "/b", "x"), "may say which bundle: -db"),
        (("run", "--bund", "/b", "x"), "may say which bundle: --bund"),
        (("run", "--conf=c", "x"), "may say which bundle: --conf=c"),
        (("run", "-fother.json", "x"), "may say which bundle: -fother.json"),
        (("run", "--new", "value", "--bundle", "/b", "x"), "may say which bundle: --new"),
    ],
)
def test_where_the_bundle_cannot_be_told_it_is_refused(tmp_path: Path, words: tuple[str, ...], why: str) -> None:
    (tmp_path / "config.json").write_text('{"ociVersion": "1", "linux": {}}')
    done = call(tmp_path, *LOG, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert why in done.stderr
    assert why in json.loads((tmp_path / "l").read_text())["msg"]
    assert "seccomp" not in (tmp_path / "config.json").read_text()


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
        ("no", "not a bundle's config.json"),
        ({"architectures": ["SCMP_ARCH_X86_64"]}, "SCMP_ARCH_X86, SCMP_ARCH_X32 would be killed"),
        ({"listenerPath": "/other"}, "its calls are notified to another agent: /other"),
        ({"syscalls": [5]}, "syscalls is not a list of objects"),
        ("[" * 100000, "nested too deeply"),
        ('{"ociVersion": "1"}', "no `linux`"),
        (os.mkfifo, "not an ordinary file: config.json"),
    ],
)
def test_a_container_that_cannot_be_guarded_is_not_started(tmp_path: Path, config: object, why: str) -> None:
    if config is os.mkfifo:
        os.mkfifo(tmp_path / "config.json")
    elif config is not None:
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


def test_a_bundle_is_guarded_by_many_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"ociVersion": "1", "linux": {"seccomp": null}}')
    change = wrapper.guard(str(tmp_path / "config.json"), "/run/g")
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda _: change.make(), range(200)))
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("given", [None, "C"])
def test_the_runtime_starts_as_if_there_were_no_wrapper(tmp_path: Path, given: str | None) -> None:
    """Python ignores two signals, and sets LC_CTYPE in the C locale."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
    environment |= {"PYTHONPATH": str(SOURCE)} | ({"LC_CTYPE": given} if given else {})
    words = [sys.executable, "-c", "from overt.guard.wrapper import main; main()", "--guard-runtime", "sh"]
    done = subprocess.run(
        [*words, "-c", 'grep SigIgn /proc/$$/status; echo "${LC_CTYPE-none}"'],
        capture_output=True, text=True, timeout=30, check=True, env=environment,
    )  # fmt: skip
    (_, ignored), (kind,) = (line.split() for line in done.stdout.splitlines())
    assert not int(ignored, 16) & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)
    assert kind == (given or "none")


def test_a_runtime_that_cannot_be_started_is_named(tmp_path: Path) -> None:
    (tmp_path / "runc").touch(mode=0o644)
    words = [sys.executable, "-c", "from overt.guard.wrapper import main; main()", "--guard-runtime"]
    done = subprocess.run(
        [*words, str(tmp_path / "runc"), "state", "x"],
        capture_output=True, text=True, timeout=30, check=False, env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{tmp_path}/runc: Permission denied" in done.stderr


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
