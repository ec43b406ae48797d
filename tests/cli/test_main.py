"""The root of the command: what every subcommand can rely on."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable

import click
import pytest

import overt
from overt.cli import main as cli
from overt.demo import perform


def overt_command(*args: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "overt", *args],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
    )


@pytest.fixture
def subcommand(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Let ``overt mount`` run a function of the test."""

    def install(function: Callable[[], object]) -> None:
        command = click.Command("mount", callback=function, params=[click.Option(["--colour"], expose_value=False)])
        monkeypatch.setattr(cli.Commands, "get_command", lambda self, ctx, name: command)

    return install


def test_version_is_printed() -> None:
    done = overt_command("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"overt {overt.__version__}\n", "")


def test_help_lists_every_subcommand_and_imports_none() -> None:
    program = (
        "import sys; from overt.cli.main import run; status = run(['--help']); "
        "print(*[name for name in sys.modules if name.startswith('overt')]); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    *page, modules = done.stdout.splitlines()
    for name, line in cli.COMMANDS.items():
        assert any(row.split() == [name, *line.split()] for row in page)
    assert set(modules.split()) == {"overt", "overt.cli", "overt.cli.main", "overt.cli.report", "overt.printable"}


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ([], "overt: Missing command"),
        (["--colour"], "overt: No such option"),
        (["sync"], "overt: No such command 'sync'"),
        (["guard"], "overt guard: Missing command"),
        (["lab"], "overt lab: Missing command"),
        (["prove", "x"], "overt prove: Invalid value for 'DESIGN': 'x' is not one of"),
        (["prove", "overt", "U99"], "overt prove: Invalid value for 'USE-CASE': 'U99' is not one of"),
        (["judge", "--only", "U99"], "overt judge: there is no scenario 'U99': --list shows them (see"),
    ],
)
def test_bad_usage_is_one_line_and_exit_status_2(args: list[str], complaint: str) -> None:
    done = overt_command(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(complaint)
    assert done.stderr.endswith(f"(see '{complaint.partition(':')[0]} --help')\n")
    assert done.stderr.count("\n") == 1


def test_bad_usage_of_a_subcommand_names_it(
    subcommand: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    subcommand(lambda: None)
    assert cli.run(["mount", "--color", "x"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("overt mount: No such option")
    assert complaint.endswith("(see 'overt mount --help')\n")
    assert complaint.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EPERM, os.strerror(errno.EPERM), "/mnt"), "overt: Operation not permitted: /mnt\n"),
        (OSError(errno.EXDEV, os.strerror(errno.EXDEV), "a", None, b"b"), "overt: Invalid cross-device link: a -> b\n"),
        (OSError(errno.EIO, os.strerror(errno.EIO), b"/\xff\x1b"), "overt: Input/output error: /\\xff\\x1b\n"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "overt: Input/output error\n"),
        (OSError("the server has gone"), "overt: the server has gone\n"),
        (BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE), "/run/overt"), "overt: Broken pipe: /run/overt\n"),
        (click.ClickException("no mount\nof ours"), "overt: no mount of ours\n"),
    ],
)
def test_an_error_that_nobody_handled_is_one_line_and_exit_status_1(
    error: Exception, line: str, subcommand: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    subcommand(fail)
    assert cli.run(["mount"]) == 1
    assert capsys.readouterr() == ("", line)


def test_a_bug_keeps_its_traceback(subcommand: Callable[..., None]) -> None:
    subcommand(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.run(["mount"])


def test_ctrl_c_is_exit_status_130_and_quiet(
    subcommand: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    subcommand(interrupted)
    assert cli.run(["mount"]) == 130
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_in_the_demo_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(perform, "perform", interrupted)
    assert cli.run(["demo"]) == 130
    assert capsys.readouterr() == ("", "overt demo: interrupted\n")


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3)])
def test_what_a_subcommand_returns_is_the_exit_status(
    returned: int | None, status: int, subcommand: Callable[..., None]
) -> None:
    subcommand(lambda: returned)
    assert cli.run(["mount"]) == status


def test_an_error_on_stdout_is_told_too() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        done = overt_command("--help", stdout=full)
    finally:
        os.close(full)
    assert (done.returncode, done.stderr) == (1, "overt: standard output: No space left on device\n")


@pytest.mark.parametrize("args", [["--help"], ["judge", "--list", "--systems", "plain"]])
def test_who_has_stopped_reading_is_told_nothing(args: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = overt_command(*args, stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
