"""Whether an upper is to be believed when it says that a flush went through.

btrfs after an aborted transaction, and ext4 of some kernels after a journal abort, tell of it once and are read-only
from there; and a read-only superblock answers every syncfs(2) with 0 (fs/sync.c, sync_filesystem). So after an error,
and when the upper turns read-only, a flush that succeeds is not believed until the upper has really been written to:

    sound --- error, or read-only ---> in doubt --- a write goes through ---> sound
    sound, in doubt --- a flush, or the write, fails ---> failing --- both go through ---> sound

While it is failing each flush fails, with the errno of the first (or EIO for EROFS, which is what other kernels' ext4
says of an aborted journal: what was written is lost, not refused). The episode is an error of the upper when it begins
and, if more than that first flush failed, once more when it ends: who wrote in between and did not ask is told as well.
"""

import errno
import os
from typing import NamedTuple

_PROVES_NOTHING = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
)  # fmt: skip
"""what a write may fail with although the upper is well; the doubt stays"""


class Verdict(NamedTuple):
    """What a flush is to be answered with, and what is to be entered into the ledger."""

    failure: OSError | None
    entry: OSError | None
    """an error of the upper"""
    source: str
    """``flush``: the flush failed; ``dead``: the write after it did"""


class Health:
    """The state of one upper. `doubt` may be called on any thread, `judge` on one at a time."""

    def __init__(self) -> None:
        self.failing: OSError | None = None
        self._in_doubt = False
        self._again = False
        self._source = ""

    def doubt(self) -> None:
        """Note that an error was seen: the next flush has to be proven by a write."""
        self._in_doubt = True

    @property
    def sound(self) -> bool:
        """Whether a flush that succeeds is to be believed as it is."""
        return self.failing is None and not self._in_doubt

    def judge(self, failure: OSError | None, scratch_fd: int) -> Verdict:
        """Judge a flush that came to `failure`; in doubt, by a write to the directory `scratch_fd` (-1: none)."""
        source = "flush"
        if failure is None and self._in_doubt:
            self._in_doubt = False  # before the write: doubt that comes during it stays
            failure, source = _write(scratch_fd), "dead"
            if failure and failure.errno in _PROVES_NOTHING:
                self._in_doubt = True
                failure = None
        if failure:
            self._in_doubt = True
            self._again = self.failing is not None
            if self._again:
                return Verdict(self.failing, None, source)
            if failure.errno == errno.EROFS:
                failure = OSError(errno.EIO, "the upper has become read-only")
            self.failing, self._source = failure, source
            return Verdict(failure, failure, source)
        if self.failing is None or self._in_doubt:
            return Verdict(self.failing, None, source)
        ended, self.failing = self.failing, None
        return Verdict(None, ended if self._again else None, self._source)


def _write(directory_fd: int) -> OSError | None:
    """Really write; None, or why the filesystem of `directory_fd` no longer takes it.

    A time stamp and fsync, not a file: it needs no space, leaves no name, and a directory that was removed will do.
    """
    if directory_fd < 0:
        return OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    try:
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory_fd)
        try:
            os.utime(fd)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        return error
    return None
