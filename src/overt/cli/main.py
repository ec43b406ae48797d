"""The root of the ``overt`` command.

A subcommand lives in a module of its own, ``overt.cli.NAME``, as a ``click.Command`` called ``command``. It is
imported only when it is asked for: ``overt umount`` must not pay for the demo, and ``--help`` must work where a
subcommand cannot.

A command's function returns None for exit status 0, or the exit status. Everything that went wrong is one line on
stderr that begins with ``overt``: a mistake in the command line (click's UsageError) is exit status 2, any other
ClickException or an OSError that nobody below could handle is 1. Other exceptions are bugs and keep their traceback.
"""

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click
import click.shell_completion

from overt import __version__
from overt.cli.report import INTERRUPTED, OutputError, complain, describe, hold_standard_descriptors, interruptible

COMMANDS = {
    "mount": "Mount an overlay.",
    "serve": "Serve many overlays from one process, behind a unix socket.",
    "umount": "Unmount an overlay and say whether anything was lost.",
    "guard": "Answer syncfs for stock containers on kernel overlayfs.",
    "status": "Show mounts, uppers and the errors they recorded.",
    "demo": "Fail a disk under a thousand overlays and count who is told.",
    "prove": "Check which design tells whom, over every history.",
    "judge": "Try the use cases on every overlay, with real faults.",
    "lab": "A directory on a disk that fails on demand, for your own programs.",
    "bench": "Measure overt beside the other overlays.",
}


class Commands(click.Group):
    """A group whose members are the rows of COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"overt.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="overt", message="%(prog)s %(version)s")
def root() -> None:
    """An overlay filesystem that does not hide errors."""


_COMPLETE = "_OVERT_COMPLETE"
"""how a shell asks for completion, and for the script by which it asks (click.shell_completion)"""


@interruptible
def run(args: Sequence[str]) -> int:
    """Run ``overt ARGS`` and return its exit status."""
    # Not click's own main(): it prints usage errors on four lines, and takes any EPIPE for that of a reader gone away
    # and says nothing.
    try:
        try:
            with root.make_context("overt", list(args)) as ctx:
                status = root.invoke(ctx)
        except click.exceptions.Exit as end:
            status = end.exit_code
        sys.stdout.flush()
    except click.UsageError as error:
        if isinstance(error, click.BadParameter) and isinstance(error.param, click.Argument) and not error.param_hint:
            # click says the argument as it is in the usage, brackets and all.
            name = error.param.metavar or str(error.param.name).upper()
            error.param_hint = f"'{name.strip('[].- ')}'"
        path = error.ctx.command_path if error.ctx else "overt"
        complain(path, f"{error.format_message()} (see '{path} --help')")
        return error.exit_code
    except click.ClickException as error:
        complain("overt", error.format_message())
        return error.exit_code
    except click.Abort:
        return INTERRUPTED
    except OSError as error:
        if not isinstance(error, OutputError) or error.errno != errno.EPIPE:  # who has stopped reading needs no word
            complain("overt", describe(error))
        return 1
    return int(status or 0)


def main() -> NoReturn:
    """The entry point."""
    hold_standard_descriptors()
    if os.path.basename(sys.argv[0]).endswith("fuse-overlayfs"):
        importlib.import_module("overt.cli.fuse_overlayfs").main()
    if _COMPLETE in os.environ:
        sys.exit(click.shell_completion.shell_complete(root, {}, "overt", _COMPLETE, os.environ[_COMPLETE]))
    status = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:
        # The status is not 0 by now; what is still buffered would fail once more, loudly, when Python shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
