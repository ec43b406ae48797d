"""``overt demo``."""

import click

from overt.cli.report import INTERRUPTED, complain
from overt.lab import FILESYSTEMS

_HELP = """Fail a disk under many overlays, and count who is told.

For each system (kernel overlayfs, fuse-overlayfs, overt; ordinary and volatile mounts; kernel overlayfs with overt
guard): one disk, --containers overlays on it, a container in each, and one write that the disk refuses. Then every
container asks, twice each: syncfs on a new descriptor, syncfs on one opened before, fsync of a file of its own.

\b
Exit status:
  0  overt told everybody it has promised to tell
  1  it did not, or the demo could not go on
  2  bad usage
  3  void: there was no error to be told of, or a system failed before it could be asked
  4  rehearsed only: without root (or loop devices, or /dev/fuse) overlays are mounted, but no error can be made
  5  overt cannot be shown: this kernel does not send syncfs to FUSE (before Linux 6.18)
"""


@click.command("demo", help=_HELP)
@click.option("--containers", type=click.IntRange(1), default=1000, show_default=True, help="Overlays for each system.")
@click.option("--fs", type=click.Choice(list(FILESYSTEMS)), default="ext4", show_default=True, help="The upper.")
@click.option("--json", "as_json", is_flag=True, help="Print a list with an object for each system, and no table.")
def command(containers: int, fs: str, as_json: bool) -> int:
    # Here, to keep the worker small: it begins as a fork of this process, and each container as a fork of the worker.
    from overt.demo.perform import perform

    try:
        with perform(containers, fs) as messages:
            from overt.demo import report

            rows = report.watch(messages)
    except KeyboardInterrupt:
        complain("overt demo", "interrupted")
        return INTERRUPTED
    if as_json:
        print(report.to_json(rows))
    else:
        report.show(rows, fs)
    return report.status(rows)
