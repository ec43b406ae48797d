"""Directories of our own where somebody else may write: a container, on its volume, and by mounts of its own there.

Between mkdir(2) and the open(2) after it that somebody can exchange the new directory for another one, or mount over
it. So what is opened is on the mount that it was made on (RESOLVE_NO_XDEV, openat2(2)), and must have the owner and the
mode that it was made with. Who could still put another in its place is who has the same user's rights there anyway.
"""

import errno
import os
import stat

from overt.host import files, process

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
BENEATH = files.RESOLVE_BENEATH | files.RESOLVE_NO_SYMLINKS | files.RESOLVE_NO_XDEV
"""how to come to what is below such a directory (RESOLVE_*): no link is followed, and no mount is entered"""
_ANOTHER = (errno.EXDEV, errno.ELOOP, errno.ENOTDIR, errno.ENOENT)


class Replaced(OSError):
    """Something else is in the place of a directory that was made just now; it is left alone."""


def make(dir_fd: int, name: str, flags: int = DIRECTORY) -> int:
    """Make the directory `name` in `dir_fd`, for us alone; return a descriptor of it, opened with `flags`.

    Raises `Replaced` if it is another's by then, and OSError as mkdir(2) and openat2(2) do. What was made may then
    still be there, wherever it is.
    """
    os.mkdir(name, 0o700, dir_fd=dir_fd)
    try:
        fd = files.openat2(dir_fd, name, flags, resolve=BENEATH)
    except OSError as error:
        if error.errno in _ANOTHER:
            raise Replaced(errno.ESTALE, "something else is in its place", name) from error
        raise
    try:
        found = os.fstat(fd)
        if found.st_uid != process.filesystem_ids()[0] or stat.S_IMODE(found.st_mode) & 0o077:
            raise Replaced(errno.ESTALE, "somebody else's is in its place", name)
    except BaseException:
        os.close(fd)
        raise
    return fd
