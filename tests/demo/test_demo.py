"""The demo: real disks, real containers, and what it says of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from overt.cli import main as cli
from overt.demo import perform, report, scenario, systems
from overt.server import client

N = 8
FIELDS = [
    "system", "mount", "containers", "new_fd", "old_fd", "fsync", "victim_fsync", "mount_seconds", "server_rss_bytes",
]  # fmt: skip

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]


def demo(*args: str, prefix: tuple[str, ...] = (), **more: Any) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", "overt", "demo", *args]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, **more)


@pytest.fixture(scope="module")
def whole_run() -> subprocess.CompletedProcess[str]:
    return demo("--containers", str(N), "--json")


@pytest.fixture
def rows(whole_run: subprocess.CompletedProcess[str]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["system"], row["mount"]): row for row in json.loads(whole_run.stdout)}


def counts(row: dict[str, Any]) -> list[list[int]]:
    assert row["outcome"] == "asked", row["note"]
    return [row[question] for question in report.QUESTIONS]


def test_json_has_an_object_for_each_system_with_the_agreed_fields(
    whole_run: subprocess.CompletedProcess[str],
) -> None:
    found = json.loads(whole_run.stdout)
    assert [(row["system"], row["mount"]) for row in found] == [
        (system, mount)
        for system in ("kernel overlayfs", "fuse-overlayfs", "overt")
        for mount in ("ordinary", "volatile")
    ] + [("overt guard", "ordinary")]
    for row in found:
        assert list(row)[: len(FIELDS)] == FIELDS
        assert row["containers"] == N


def test_kernel_overlayfs_tells_nobody_but_the_victims_fsync(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert counts(rows["kernel overlayfs", "ordinary"]) == [[0, 0], [0, 0], [0, 0], [1, 0]]


def test_volatile_kernel_overlayfs_tells_everybody_for_ever(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert counts(rows["kernel overlayfs", "volatile"]) == [[N, N], [N, N], [N, N], [1, 1]]


@pytest.mark.skipif(not shutil.which("fuse-overlayfs"), reason="fuse-overlayfs is not installed")
def test_syncfs_never_reaches_fuse_overlayfs_and_volatile_tells_nobody(
    rows: dict[tuple[str, str], dict[str, Any]],
) -> None:
    assert counts(rows["fuse-overlayfs", "ordinary"]) == [[0, 0], [0, 0], [0, 0], [1, 0]]
    assert counts(rows["fuse-overlayfs", "volatile"]) == [[0, 0], [0, 0], [0, 0], [0, 0]]
    assert rows["fuse-overlayfs", "ordinary"]["server_rss_bytes"] > N * 100_000


def test_overt_tells_as_promised_and_the_exit_status_says_so(
    whole_run: subprocess.CompletedProcess[str], rows: dict[tuple[str, str], dict[str, Any]]
) -> None:
    assert counts(rows["overt", "ordinary"]) == [[N, 0], [N, 0], [0, 0], [1, 0]]
    assert counts(rows["overt", "volatile"]) == [[N, N], [N, N], [N, N], [1, 1]]
    assert (whole_run.returncode, whole_run.stderr) == (0, "")


def test_the_guard_has_the_kernels_own_overlayfs_tell_each_container_once(
    rows: dict[tuple[str, str], dict[str, Any]],
) -> None:
    assert counts(rows["overt guard", "ordinary"]) == [[N, 0], [N, 0], [0, 0], [1, 0]]
    assert rows["overt guard", "ordinary"]["server_rss_bytes"] > 1_000_000


@pytest.fixture
def only_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perform, "all_systems", lambda: [systems.KernelOverlayfs(False)])


@pytest.mark.usefixtures("only_the_kernels")
@pytest.mark.parametrize("filesystem", ["xfs", "btrfs"])
def test_the_error_is_real_on_other_filesystems(filesystem: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["demo", "--containers", "2", "--fs", filesystem, "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert counts(row) == [[0, 0], [0, 0], [0, 0], [1, 0]]


@pytest.mark.usefixtures("only_the_kernels")
def test_a_run_without_an_error_is_void_and_has_its_own_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scenario.Disk, "fail", lambda self, what: None)
    assert cli.run(["demo", "--containers", "2", "--json"]) == report.VOID
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["outcome"], row["new_fd"], row["victim_fsync"]) == ("void", None, None)


def test_a_system_that_is_not_installed_is_shown_as_such(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(perform, "all_systems", lambda: [systems.FuseOverlayfs(False)])
    monkeypatch.setenv("PATH", "/nowhere")
    cli.run(["demo", "--containers", "2"])
    assert "fuse-overlayfs, ordinary: not installed\n" in capsys.readouterr().out


def test_a_system_that_fails_is_a_row_and_voids_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(systems.KernelOverlayfs):
        def mount(self, layers: systems.Layers) -> int:
            return super().mount(layers._replace(work="/nowhere"))

    monkeypatch.setattr(perform, "all_systems", lambda: [Broken(False)])
    assert cli.run(["demo", "--containers", "2", "--json"]) == report.VOID
    (row,) = json.loads(capsys.readouterr().out)
    assert row["outcome"] == "failed"
    assert "/nowhere" in row["note"] or "No such file" in row["note"]


_WITHOUT_SYNCFS = """
import sys
from overt.server import connect
def refused(*_):
    raise OSError(95, "no loop device")
connect._mount_block = refused
from overt.cli.main import main
main()
"""


@pytest.mark.parametrize("volatile", [False, True])
def test_where_the_kernel_sends_no_syncfs_overt_cannot_be_shown(
    volatile: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As before Linux 6.18: a plain FUSE mount, to which syncfs(2) is not delivered."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nshift 2\nexec {sys.executable} -c '{_WITHOUT_SYNCFS}' \"$@\"\n")
    program.chmod(0o755)
    monkeypatch.setattr(perform, "all_systems", lambda: [systems.Overt(volatile)])
    monkeypatch.setattr(client, "sys", SimpleNamespace(executable=str(program)))
    assert cli.run(["demo", "--containers", "2", "--json"]) == report.BLIND
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["outcome"], row["new_fd"]) == ("blind", None)
    assert row["note"] == "this kernel does not send syncfs to FUSE (before Linux 6.18)"


def test_a_system_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Hanging(systems.KernelOverlayfs):
        def mount(self, layers: systems.Layers) -> int:
            time.sleep(100)
            return super().mount(layers)

    monkeypatch.setattr(perform, "all_systems", lambda: [Hanging(False), systems.KernelOverlayfs(True)])
    monkeypatch.setattr(perform, "_PATIENCE", 5)
    assert cli.run(["demo", "--containers", "2", "--json"]) == report.VOID
    hung, next_one = json.loads(capsys.readouterr().out)
    assert (hung["outcome"], hung["note"]) == ("failed", "failed: no progress for 5 s")
    assert next_one["outcome"] == "asked"


def test_without_root_the_rest_is_rehearsed_and_one_line_says_what_is_missing(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-Ur", "true"], capture_output=True, timeout=10).returncode:
        pytest.skip("no user namespaces")
    done = demo("--containers", "2", "--json", prefix=("unshare", "-Ur"), env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == report.REHEARSED
    assert done.stderr.startswith("overt demo: missing here: loop devices") and done.stderr.count("\n") == 1
    kernel = json.loads(done.stdout)[0]
    assert (kernel["outcome"], kernel["note"], kernel["new_fd"]) == ("rehearsed", "not asked", None)
    assert 0 < kernel["mount_seconds"] < 10
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
@pytest.mark.parametrize("after", [0.7, 1.5])
def test_an_interrupted_demo_leaves_nothing_behind(
    number: signal.Signals, status: int, after: float, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "overt", "demo", "--containers", "200"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(tmp_path)}, start_new_session=True
    ) as process:
        wait_until(lambda: any(tmp_path.iterdir()))
        time.sleep(after)
        os.killpg(process.pid, number)  # as a terminal does
        assert process.wait(60) == status
    wait_until(lambda: not any(tmp_path.iterdir()))  # after SIGTERM the worker tidies up alone


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
