"""umount.fuse.overt: what umount(8) runs for a mount of overt's, if it finds it in /sbin by the mount's type.

    umount.fuse.overt MNT [-flnrv] [-N NAMESPACE] [-t TYPE]

umount(2) returns no error of the disk. This asks the server to unmount, as `overt umount` does, and tells what was
lost: exit status 32 and a line then, although the mount is gone, so that no script and no systemd unit takes it for
well.
"""

import getopt
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from overt.cli.report import complain, describe, hold_standard_descriptors, interruptible
from overt.host import mounts
from overt.printable import printable
from overt.server import registry
from overt.server.client import Client, ServerError

_WHO = "umount.fuse.overt"
_FAILED = 32


@interruptible
def run(args: Sequence[str]) -> int:
    """Unmount as `args` say; return the exit status. Whatever is wrong is one line on stderr."""
    try:
        given, places = getopt.gnu_getopt(list(args), "flnrvt:N:")
        flags = dict(given)
        if len(places) != 1 or not places[0] or "-N" in flags:
            raise getopt.GetoptError(f"usage: {_WHO} MNT [-flnrv]")
        how = (mounts.MNT_DETACH if "-l" in flags else 0) | (mounts.MNT_FORCE if "-f" in flags else 0)
        verdict = _umount(os.path.abspath(places[0]), how)
        if verdict != _WELL:
            complain(_WHO, f"{places[0]}: unmounted; {verdict}")
            return _FAILED
        return 0
    except (getopt.GetoptError, ServerError) as error:
        complain(_WHO, str(error))
    except OSError as error:
        complain(_WHO, describe(error))
    return _FAILED


_WELL = "no error recorded"


def _umount(target: str, how: int) -> str:
    """Unmount, by the server where it can be asked; what became of the data."""
    entries = [entry for entry in registry.entries() if entry.target == target and entry.alive]
    if entries and not how:
        with Client(registry.directory() / f"{entries[-1].pid}.sock") as client:
            if client.same_mounts:  # else it would unmount its own, and not the copy in this namespace
                record = client.umount(target)
                files = ", ".join(map(printable, record.get("files", ())))
                more = " and perhaps more" if files and record["perhaps_more"] else ""
                return f"{record['verdict']}: {files}{more}" if files else str(record["verdict"])
    mounts.umount(target, how)
    return _WELL


def main() -> NoReturn:
    """The entry point."""
    hold_standard_descriptors()
    sys.exit(run(sys.argv[1:]))
