"""mount.fuse.overt: what mount(8) runs for `mount -t fuse.overt -o lowerdir=... SOURCE MNT`, and for lines of fstab(5).

    mount.fuse.overt SOURCE MNT [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]

SOURCE means nothing to an overlay; a name without a slash is what the mount is called in the mount table. The exit
statuses are mount(8)'s: 0, and 32 for a mount that failed. mount(8) looks for its helpers in /sbin, by the type: that
of a mount that is there is fuseblk.overt, so it wants a link of that name (docs/mounting.md).
"""

import getopt
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from overt.cli import shared
from overt.cli.background import in_background
from overt.cli.report import complain, describe, hold_standard_descriptors, interruptible
from overt.host import mounts
from overt.overlay.options import LASTING, OPPOSITES, OptionError, UnknownOption, is_source, items, understand
from overt.server import registry

_WHO = "mount.fuse.overt"
_USAGE = f"usage: {_WHO} SOURCE MNT [-sfnv] [-o OPTIONS]"
_FAILED = 32
_SERVER = "server="
"""an option of this command: the socket of the server (overt serve) that is to hold the mount"""
_FOR_OTHERS = ("x-", "X-", "comment=", _SERVER)
_ATTRIBUTES = {
    "ro": mounts.MOUNT_ATTR_RDONLY, "nosuid": mounts.MOUNT_ATTR_NOSUID, "nodev": mounts.MOUNT_ATTR_NODEV,
    "noexec": mounts.MOUNT_ATTR_NOEXEC, "nosymfollow": mounts.MOUNT_ATTR_NOSYMFOLLOW,
}  # fmt: skip
"""what can be changed of a mount's place"""


@interruptible
def run(args: Sequence[str]) -> int:
    """Mount as `args` say; return the exit status. Whatever is wrong is one line on stderr."""
    try:
        given, places = getopt.gnu_getopt(list(args), "sfnvo:t:N:", ["help"])
        flags = dict(given)
        if "--help" in flags:
            print(_USAGE, flush=True)
            return 0
        if len(places) != 2 or not places[1]:
            raise getopt.GetoptError(_USAGE)
        if "-N" in flags:
            raise getopt.GetoptError("-N: mount in the namespace itself (nsenter -m)")
        words = items(",".join(value for flag, value in given if flag == "-o"))
        if "remount" in words:
            if "-f" not in flags:
                _remount(os.path.realpath(places[1]), words)
            return 0
        rest = [word for word in words if not word.startswith(_FOR_OTHERS)]
        options = understand(rest, sloppy="-s" in flags).absolute()
        if is_source(places[0]):
            options = options._replace(source=places[0])
        if "-f" in flags:
            return 0
        servers = [word.removeprefix(_SERVER) for word in words if word.startswith(_SERVER)]
        status = shared.mount(options, places[1], servers[-1]) if servers else None
        return _FAILED if (in_background(options, places[1]) if status is None else status) else 0
    except UnknownOption as error:
        complain(_WHO, f"{error} (overt mount --help lists them)")
    except (getopt.GetoptError, OptionError) as error:
        complain(_WHO, str(error))
    except OSError as error:
        complain(_WHO, describe(error))
    return _FAILED


def _remount(target: str, words: Sequence[str]) -> None:
    """Change what can be changed of a mount: the attributes of its place.

    Not its superblock: the kernel never asks a read-only one to sync, and it could not be told of an error. mount(8)
    hands on all that shall be, what is there already too, and of `exec` nothing: what is not said is taken back.
    """
    if not registry.is_mount(target):
        raise OptionError(f"{target}: not an overt mount, so it cannot be remounted")
    wanted: set[str] = set()
    for word in words:  # of two that contradict each other the later counts
        wanted.discard(OPPOSITES.get(word, ""))
        wanted.update({word} & _ATTRIBUTES.keys())
    add = sum(_ATTRIBUTES[word] for word in wanted)
    remove = sum(bit for word, bit in _ATTRIBUTES.items() if word not in wanted and (word != "ro" or "rw" in words))
    fd = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mounts.set_attributes(fd, add, remove)
        if remove & mounts.MOUNT_ATTR_RDONLY and os.fstatvfs(fd).f_flag & os.ST_RDONLY:
            raise OptionError(f"{target}: stays read-only: it has no upperdir=, or was made so with mount -i")
    finally:
        os.close(fd)
    asked = [word for word in words if word.partition("=")[0] in LASTING]
    if asked and not any(word.startswith("lowerdir") for word in asked):  # then they are what fstab has said all along
        complain(_WHO, f"{target}: a remount does not change {', '.join(asked)}: unmount, and mount anew")


def main() -> NoReturn:
    """The entry point."""
    hold_standard_descriptors()
    sys.exit(run(sys.argv[1:]))
