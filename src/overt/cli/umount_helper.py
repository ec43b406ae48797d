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
_USAGE = f"usage: {_WHO} MNT [-flnrv]"
_FAILED = 32


@interruptible
def run(args: Sequence[str]) -> int:
    """Unmount as `args` say; return the exit status. Whatever is wrong is one line on stderr."""
    try:
        given, places = getopt.gnu_getopt(list(args), "flnrvt:N:", ["help"])
        flags = dict(given)
        if "--help" in flags:
            print(_USAGE, flush=True)
            return 0
        if len(places) != 1 or not places[0] or "-N" in flags:
            raise getopt.GetoptError(_USAGE)
        how = (mounts.MNT_DETACH if "-l" in flags else 0) | (mounts.MNT_FORCE if "-f" in flags else 0)
        verdict = _umount(os.path.abspath(places[0]), how)
        if verdict != _WELL:
            complain(_WHO, f"{places[0]}: unmounted; {verdict}")
        return 0 if verdict in (_WELL, _ELSEWHERE) else _FAILED
    except (getopt.GetoptError, ServerError) as error:
        complain(_WHO, str(error))
    except OSError as error:
        complain(_WHO, describe(error))
    return _FAILED


_WELL = "no error recorded"
_ELSEWHERE = "still mounted elsewhere"
"""nothing is lost, and nothing is over: the verdict comes with the last of its places"""
_DEAD = "its server was dead: what it had not flushed may be lost"


def _umount(target: str, how: int) -> str:
    """Unmount, by the server where it can be asked; what became of the data."""
    entry = registry.owner(target)
    if entry is not None and entry.alive and not how:
        with Client(registry.directory() / f"{entry.pid}.sock") as client:
            if client.same_mounts:  # else it would unmount its own, and not the copy in this namespace
                record = client.umount(entry.target)
                files = ", ".join(map(printable, record.get("files", ())))
                more = " and perhaps more" if files and record["perhaps_more"] else ""
                return f"{record['verdict']}: {files}{more}" if files else str(record["verdict"])
    dead = registry.is_dead_mount(target) if entry is None else entry.dead and registry.mounted(entry)
    mounts.umount(target, how)
    if entry is not None and dead:
        registry.remove(entry.file)
    return _DEAD if dead else _WELL


def main() -> NoReturn:
    """The entry point."""
    hold_standard_descriptors()
    sys.exit(run(sys.argv[1:]))
