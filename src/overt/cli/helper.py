"""mount.fuse.overt: what mount(8) runs for `mount -t fuse.overt -o lowerdir=... SOURCE MNT`, and for lines of fstab(5).

    mount.fuse.overt SOURCE MNT [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]

SOURCE means nothing to an overlay. The exit statuses are mount(8)'s: 0, and 32 for a mount that failed. mount(8) looks
for its helpers in /sbin: put a link there.
"""

import getopt
import sys
from collections.abc import Sequence
from typing import NoReturn

from overt.cli import shared
from overt.cli.background import in_background
from overt.cli.report import complain, describe
from overt.overlay.options import OptionError, items, understand

_WHO = "mount.fuse.overt"
_USAGE = f"usage: {_WHO} SOURCE MNT [-sfnv] [-o OPTIONS]"
_FAILED = 32
_SERVER = "server="
"""an option of this command: the socket of the server (overt serve) that is to hold the mount"""


def run(args: Sequence[str]) -> int:
    """Mount as `args` say; return the exit status. Whatever is wrong is one line on stderr."""
    try:
        given, places = getopt.gnu_getopt(list(args), "sfnvo:t:N:")
        flags = dict(given)
        if len(places) != 2:
            raise getopt.GetoptError(_USAGE)
        if "-N" in flags:
            raise getopt.GetoptError("-N: mount in the namespace itself (nsenter -m)")
        text = ",".join(value for flag, value in given if flag == "-o")
        words = items(text)
        servers = [word.removeprefix(_SERVER) for word in words if word.startswith(_SERVER)]
        rest = [word for word in words if not word.startswith(_SERVER)]
        options = understand(rest, sloppy="-s" in flags).absolute()
        if "-f" in flags:
            return 0
        status = shared.mount(options, places[1], servers[-1]) if servers else None
        return _FAILED if (in_background(options, places[1]) if status is None else status) else 0
    except (getopt.GetoptError, OptionError) as error:
        complain(_WHO, str(error))
    except OSError as error:
        complain(_WHO, describe(error))
    return _FAILED


def main() -> NoReturn:
    """The entry point."""
    sys.exit(run(sys.argv[1:]))
