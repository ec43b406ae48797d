"""mount.fuse.overt: what mount(8) runs for `mount -t fuse.overt -o lowerdir=... SOURCE MNT`, and for lines of fstab(5).

    mount.fuse.overt SOURCE MNT [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]

SOURCE means nothing to an overlay. The exit statuses are mount(8)'s: 0, and 32 for a mount that failed. mount(8) looks
for its helpers in /sbin: put a link there.
"""

import getopt
import sys
from collections.abc import Sequence
from typing import NoReturn

from overt.cli.main import complain, describe
from overt.cli.mount import in_background
from overt.overlay.options import OptionError, parse

_WHO = "mount.fuse.overt"
_USAGE = f"usage: {_WHO} SOURCE MNT [-sfnv] [-o OPTIONS]"
_FAILED = 32


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
        options = parse(text, sloppy="-s" in flags).absolute()
        if "-f" in flags:
            return 0
        return _FAILED if in_background(options, places[1]) else 0
    except (getopt.GetoptError, OptionError) as error:
        complain(_WHO, str(error))
    except OSError as error:
        complain(_WHO, describe(error))
    return _FAILED


def main() -> NoReturn:
    """The entry point."""
    sys.exit(run(sys.argv[1:]))
