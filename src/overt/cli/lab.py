"""``overt lab``: a directory on a disk that fails on demand, for programs under test."""

import errno
import json
import math
import os
import sys
from typing import Any

import click

from overt.cli.report import complain
from overt.lab.filesystems import FILESYSTEMS
from overt.lab.image import MARKED, MEANING
from overt.printable import printable

_YEAR = 366 * 86400.0
_MIB = 1 << 20
_LARGEST = 1 << 20
"""MiB of a disk"""

_UP = """Mount a new filesystem at DIR, on a disk in memory that fails when it is told to.

It stays until `overt lab down DIR`. If the process that keeps it is killed, the disk goes with it.
"""
_FAIL = """Let requests fail from now on: WHAT is data, metadata, all, write, read, flush or discard.

\b
data        writes that contain --marker; metadata: writes that do not
all         every write, flush and discard (the default)
write, ...  requests of that kind
"""
_RUN = """Run a program in a directory on a disk that fails, and then take the disk away.

The directory is the program's working directory, and $OVERT_LAB. Exit status: the program's.

\b
overt lab run --fail flush --skip 3 -- ./my-database-test
overt lab run --fail data --marker PRECIOUS --after 1.5 -- ./writer
"""


def errno_named(ctx: click.Context, parameter: click.Parameter, value: str) -> int:
    """EIO, ENOSPC, ..."""
    number = getattr(errno, value, None)
    if not isinstance(number, int):
        raise click.BadParameter(f"{value} is not the name of an errno")
    return number


class _Seconds(click.FloatRange):
    """A span of time, of a year at most: no timer takes infinity."""

    def __init__(self) -> None:
        super().__init__(0, _YEAR)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):  # which is in every range
            self.fail(f"{value} is not a number of seconds", param, ctx)
        return seconds


_what = click.Choice(list(MEANING))
_filesystem = click.option("--fs", type=click.Choice(list(FILESYSTEMS)), default="ext4", show_default=True,
                           help="The filesystem on it.")  # fmt: skip
_size = click.option("--size", type=click.IntRange(8, _LARGEST), default=256, show_default=True,
                     help="Of the disk, in MiB.")  # fmt: skip
_options = click.option("-o", "mount_options", default="", metavar="OPTIONS", help="Mount options of the filesystem.")
_errno = click.option("--errno", "code", default="EIO", show_default=True, callback=errno_named, metavar="NAME",
                      help="What the disk answers.")  # fmt: skip
_marker = click.option("--marker", metavar="TEXT", help="Tells data from metadata: writes that contain TEXT are data.")
_skip = click.option("--skip", type=click.IntRange(0), default=0, help="So many of them go well first.")


@click.group("lab", no_args_is_help=False)
def command() -> None:
    """A directory on a disk that fails on demand, for your own programs."""


@command.command("up", help=_UP)
@_filesystem
@_size
@_options
@click.argument("directory", metavar="DIR")
def up(fs: str, size: int, mount_options: str, directory: str) -> None:
    from overt.lab import stand

    _check_place(directory)
    stand.up(directory, fs, _bytes(fs, size), mount_options)


@command.command("fail", help=_FAIL)
@_errno
@_marker
@_skip
@click.argument("directory", metavar="DIR")
@click.argument("what", type=_what, default="all")
def fail(code: int, marker: str | None, skip: int, directory: str, what: str) -> None:
    _check(what, marker)
    _ask(directory, "fail", what=what, code=code, marker=marker, skip=skip)


@command.command("heal")
@click.argument("directory", metavar="DIR")
def heal(directory: str) -> None:
    """Let every request succeed again, and answer what hangs."""
    _ask(directory, "heal")
    _ask(directory, "resume")


@command.command("hang")
@click.option("--seconds", type=_Seconds(), default=60.0, show_default=True, help="At most so long.")
@click.argument("directory", metavar="DIR")
def hang(seconds: float, directory: str) -> None:
    """Answer no request until `heal`."""
    _ask(directory, "hang", seconds=seconds)


@command.command("push")
@click.argument("directory", metavar="DIR")
def push(directory: str) -> None:
    """Have the kernel write back now what is dirty, telling no program how that went."""
    _ask(directory, "push")


@command.command("snapshot")
@click.option("--durable", is_flag=True, help="What a power cut would leave: nothing since the last flush.")
@click.argument("directory", metavar="DIR")
@click.argument("file", metavar="FILE")
def snapshot(durable: bool, directory: str, file: str) -> None:
    """Write the contents of the disk to FILE, an image that can be mounted."""
    _ask(directory, "snapshot", path=os.path.abspath(file), durable=durable)


@command.command("status")
@click.option("--json", "as_json", is_flag=True, help="Everything, as an object.")
@click.argument("directory", metavar="DIR")
def status(as_json: bool, directory: str) -> None:
    """Say how the disk is, and what it was asked."""
    found = _ask(directory, "status")
    if as_json:
        print(json.dumps(found))
        return
    failing = f" ({', '.join(found['failing'])})" if found["failing"] else ""
    print(f"{printable(found['directory'])}: {found['filesystem']} on {found['device']}, {found['size'] // _MIB} MiB: "
          f"{found['state']}{failing}")  # fmt: skip
    for kind in ("reads", "writes", "flushes", "discards"):
        print(f"{kind:9} {found[kind]:8}   refused {found['failed_' + kind]:8}")


@command.command("down")
@click.argument("directory", metavar="DIR")
def down(directory: str) -> None:
    """Unmount it and take the disk away."""
    _ask(directory, "down")


@command.command("run", help=_RUN, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_filesystem
@_size
@_options
@click.option("--fail", "what", type=_what, default="all", show_default=True, help="What fails.")
@_errno
@_marker
@_skip
@click.option("--after", type=_Seconds(), default=0.0, help="Seconds after the start.")
@click.option("--heal-after", type=_Seconds(), default=None, help="Seconds after that it is well again.")
@click.argument("program", nargs=-1, required=True, metavar="-- CMD...")
def run(
    fs: str, size: int, mount_options: str, what: str, code: int, marker: str | None, skip: int, after: float,
    heal_after: float | None, program: tuple[str, ...],
) -> int:  # fmt: skip
    from overt.lab import Disk
    from overt.lab.program import Fault, run

    _check(what, marker)
    _check_rights()
    fault = Fault(what, code, os.fsencode(marker) if marker else None, after, skip, heal_after)
    with Disk(fs, _bytes(fs, size), mount_options=mount_options) as disk:
        ended = run(program, disk, fault)
    counts = ended.counters
    asked = f"{counts.writes} writes, {counts.flushes} flushes and {counts.reads} reads"
    print(f"overt lab: refused {ended.refused} of {asked}; exit status {ended.status}", file=sys.stderr)
    return ended.status


def _check(what: str, marker: str | None) -> None:
    if what in ("data", "metadata") and not marker:
        raise click.UsageError(f"{what} is told by --marker: a text that is in the data and nowhere else")
    if marker and what not in MARKED:
        raise click.UsageError(f"--marker tells writes apart, which {what} are not: it is for {', '.join(MARKED)}")


def _check_rights() -> None:
    if os.geteuid() != 0:
        raise click.ClickException("lab needs root, to attach loop devices and to mount")


def _check_place(directory: str) -> None:
    if not directory:
        raise click.UsageError("DIR is empty")
    _check_rights()


def _bytes(fs: str, size: int) -> int:
    """So many MiB in bytes, or what the filesystem takes at least: the user is told then."""
    least = FILESYSTEMS[fs].least
    if size * _MIB < least:
        complain("overt lab", f"--size {size}: {fs} takes {least // _MIB} MiB at least, and gets them")
    return max(size * _MIB, least)


def _ask(directory: str, verb: str, **values: object) -> Any:
    from overt.lab import stand

    _check_place(directory)
    found = stand.ask(directory, verb, **values)
    return found
