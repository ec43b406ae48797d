"""Manual pages and completion know every command and option; the unit grants what the server keeps."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from overt.cli import main as cli
from overt.guard import supervisor
from overt.overlay import options
from overt.overlay.fuse_overlayfs import OWN
from overt.overlay.view import FLAGS, VALUES
from overt.server.main import CAPABILITIES

ROOT = Path(__file__).resolve().parents[2]


def page(name: str) -> str:
    """A manual page as text: without its macros, and with plain dashes."""
    text = (ROOT / "man" / name).read_text()
    return re.sub(r"^\.[A-Z]+ ?", "", text.replace("\\-", "-").replace("\\fR", ""), flags=re.MULTILINE)


def commands() -> list[tuple[str, click.Command]]:
    context = click.Context(cli.root)
    found = [(name, cli.root.get_command(context, name)) for name in cli.root.list_commands(context)]
    return [(name, command) for name, command in found if command is not None]


def section(heading: str) -> str:
    """A subsection of overt(1)."""
    text = (ROOT / "man/overt.1").read_text().replace("\\-", "-")
    return re.split(r"^\.S[SH]", text.split(f"\n.SS {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


@pytest.mark.parametrize(("name", "command"), commands())
def test_every_command_and_option_is_in_the_manual(name: str, command: click.Command) -> None:
    text = section(f"overt {name}")
    nested = list(command.commands.items()) if isinstance(command, click.Group) else []
    assert [word for word, _ in nested if not re.search(rf"\b{word}\b", text)] == []
    for parameter in [*command.params, *(parameter for _, each in nested for parameter in each.params)]:
        for word in parameter.opts if isinstance(parameter, click.Option) else [parameter.metavar or ""]:
            if word not in ("-h", "--help"):
                assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text), f"{name} {word}"


def test_every_mount_option_is_in_the_manual() -> None:
    text = page("mount.fuse.overt.8")
    words = {"server", "remount", *VALUES, *FLAGS, *options._FLAGS, *options._VALUED, *options._REPEATED}
    words |= {*options._ATIME, "diratime", "nodiratime"} - {"nostrictatime"}
    words |= {f"fsync={mode}" for mode in options.FSYNC_MODES} | {f"unseen={mode}" for mode in options.UNSEEN_MODES}
    words |= {name.rstrip("=") for name in OWN}
    missing = [word for word in words if not re.search(rf"(?<![\w]){re.escape(word)}(?![\w])", text)]
    assert missing == []


def test_the_environment_and_the_well_known_socket_are_in_the_manual() -> None:
    for name in ("overt.1", "overt-fuse-overlayfs.1"):
        assert "OVERT_SERVER" in page(name)
        assert "/run/overt/serve.sock" in page(name)


def test_the_pages_are_well_formed() -> None:
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is not installed")
    for path in sorted((ROOT / "man").iterdir()):
        done = subprocess.run(["mandoc", "-Tlint", "-W", "error", path], capture_output=True, text=True, timeout=30)
        assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "offered"),
    [(["overt", "m"], {"mount"}), (["overt", "mount", "--s"], {"--server"}), (["overt", "demo", "--fs", "x"], {"xfs"})],
)
def test_completion(words: list[str], offered: set[str]) -> None:
    environment = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1), "_OVERT_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [sys.executable, "-m", "overt"], env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment},
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert {line.split(",")[1] for line in done.stdout.splitlines()} == offered


def test_the_unit_grants_the_capabilities_that_the_server_keeps() -> None:
    unit = (ROOT / "systemd/overt.service").read_text()
    (granted,) = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    assert {word.removeprefix("CAP_").lower() for word in granted.split()} == CAPABILITIES | {"setpcap"}
    assert "ExecStart=/usr/bin/overt serve --foreground --socket /run/overt/serve.sock" in unit


def test_the_guards_unit_grants_the_capabilities_that_the_guard_keeps() -> None:
    unit = (ROOT / "systemd/overt-guard.service").read_text()
    (granted,) = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    assert {word.removeprefix("CAP_").lower() for word in granted.split()} == supervisor.CAPABILITIES | {"setpcap"}
    assert "ExecStart=/usr/bin/overt guard run --foreground --socket /run/overt/guard.sock" in unit
