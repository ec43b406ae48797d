"""overt in the place of fuse-overlayfs: its command line, its exit statuses (0, and 1 for whatever went wrong).

    fuse-overlayfs [-f] [-d] [-o OPTIONS]... MNT

containers/storage (podman, buildah) starts it in its own directory, with relative paths, waits for the end of its
output, and shows what it said. What it does not know it passes over, as fuse-overlayfs does.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from overt import __version__
from overt.cli.report import complain, describe, hold_standard_descriptors, interruptible
from overt.overlay import fuse_overlayfs
from overt.overlay.options import OptionError, Options

NAME = "fuse-overlayfs"
_AS = "1.14"
_HELP = f"""\
usage: {NAME} [-f] [-d] [-o OPTION[,OPTION...]]... MNT

    -h, --help      print this
    -V, --version   print the version
    -f              stay in the foreground
    -d, --debug     the same; events go to standard error
    -o OPTIONS      lowerdir=, upperdir=, workdir=, uidmapping=, gidmapping=, squash_to_root, ...

This is overt, which takes fuse-overlayfs's command line. Unmount with umount, fusermount3 -u, or overt umount.
"""


class Asked(NamedTuple):
    """A command line."""

    text: str
    """of all -o, with commas between"""
    places: list[str]
    foreground: bool
    instead: str
    """what to print instead of mounting, if anything"""
    unknown: list[str]


def read(args: Sequence[str]) -> Asked:
    """Read a command line; options may stand before and behind the mount point."""
    texts: list[str] = []
    places: list[str] = []
    unknown: list[str] = []
    foreground, instead = False, ""
    words = iter(args)
    for word in words:
        if word in ("-f", "-d", "--debug"):
            foreground = True
        elif word in ("-h", "--help"):
            instead = _HELP
        elif word in ("-V", "--version"):
            instead = f"{NAME}: version {_AS}\novert: version {__version__}\n"
        elif word.startswith("-o"):
            text = word[2:] or next(words, None)
            if text is None:
                raise OptionError("-o needs a value")
            texts.append(text)
        elif not word.startswith("-"):
            places.append(word)
        elif word != "-s":
            unknown.append(word)
    return Asked(",".join(texts), places, foreground, instead, unknown)


@interruptible
def run(args: Sequence[str]) -> int:
    """Mount as `args` say; return the exit status. Whatever is wrong is one line on stderr."""
    try:
        asked = read(args)
        if asked.instead:
            print(asked.instead, end="", flush=True)
            return 0
        options, unknown = fuse_overlayfs.parse(asked.text)
        for item in asked.unknown + unknown:
            complain(NAME, f"unknown argument ignored: {item}")
        if len(asked.places) != 1 or not asked.places[0]:
            raise OptionError(
                f"{'too many mount points' if asked.places[1:] else 'no mountpoint specified'} (see {NAME} -h)"
            )
        return _mount(options.absolute(), asked.places[0], foreground=asked.foreground)
    except OptionError as error:
        complain(NAME, str(error))
    except OSError as error:
        complain(NAME, describe(error))
    return 1


def _mount(options: Options, target: str, *, foreground: bool) -> int:
    from overt.cli import background, shared

    if foreground:
        return background.in_foreground(options, target)
    status = shared.mount(options, target)
    return background.in_background(options, target) if status is None else min(status, 1)


def main() -> NoReturn:
    """The entry point."""
    hold_standard_descriptors()
    sys.exit(run(sys.argv[1:]))
