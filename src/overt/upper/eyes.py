"""How one upper's errors are seen: a state machine over the probes, the tracepoint and a cursor.

    ARMED   a volatile probe stands and has not fired. No error since it was mounted.
    FIRED   it fired, and will fire for ever: from here it tells nothing. What comes next is seen by
              the tracepoint, if there is one: any further event on this superblock is a new error;
              the cursor otherwise: see below.

The cursor is a descriptor of the upper, opened when the upper became known. syncfs on it tells, but it takes the error
away from the host, and it flushes. So it is used only where nothing else is left, and never by `look`:

    FIRED, no tracepoint   `renew` consumes the error and mounts a fresh probe: ARMED again. "Taken from the host".
    no probes at all       `flush` is syncfs on the cursor, which consumes whatever it tells. With a tracepoint `look`
                           works all the same; without one, `look` is blind between flushes, and the owner of a
                           volatile overlay has to be warned that rule 8 of the contract cannot be kept there.

What an error found in this way is *not*: the raw errno. A probe knows that there was one, and says EIO.

Nothing here takes a lock. `look` changes the state and must be serialised with `install`; `flush`, `renew` and
`let_go_of_fired` take as long as the disk takes.
"""

import contextlib
import errno
import fcntl
import os
import re
from typing import NamedTuple

from overt.host import files, mounts, private
from overt.upper import probes
from overt.upper.trace import Span, Trace

_LOCK = re.compile(rb"^lock:.* ([0-9a-f]+):([0-9a-f]+):\d+ ", re.MULTILINE)
_ROUNDS = 5
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Sighting(NamedTuple):
    """An error that was seen."""

    errno: int
    source: str
    taken: bool
    inodes: dict[int, Span] | None
    """of which inodes, and when; None where that is not (wholly) known"""


class Flushed(NamedTuple):
    """What a flush came to."""

    failure: OSError | None
    """the flush itself failed"""
    told: int
    """the errno (positive) that was told and consumed by flushing through the cursor, or 0"""


class Renewal(NamedTuple):
    """A fresh probe (or None: it cannot be had), and whether errors were consumed for it."""

    probe: int | None
    taken: bool
    later: bool = False
    """it could not be had for want of room, of which there may be some the next time"""


NONE = Renewal(None, False)


class Carried(NamedTuple):
    """Eyes as one process leaves them to the next. The descriptors are the receiver's; -1: there is none."""

    cursor: int
    plain: int
    probe: int
    accepted: bool
    known: bool
    born_read_only: bool


class Eyes:
    """The descriptors with which one upper is flushed and watched."""

    def __init__(
        self, s_dev: int, directory_fd: int, scratch_fd: int, trace: Trace | None, carried: Carried | None = None
    ) -> None:
        """Open them: `directory_fd` on the upper, `scratch_fd` a private directory there. OSError as open(2) raises.

        `carried`: go on with what another process has left. Nothing is looked at: what happened in between is seen by
        the next `look`.

        `standing` is then the error that stood unseen on the upper already, if one did. Where kernel overlayfs does not
        accept the upper, `refused` is its explanation. `private.Replaced` where somebody meddles with `scratch_fd`, and
        so in `prepare_flush`: that says nothing of the upper, which other overlays share.
        """
        self.refused: OSError | None = None
        self.standing: Sighting | None = None
        self._known = False  # whether the cursor is yet to tell what the tracepoint has told
        self._accepted = True  # whether kernel overlayfs accepts the upper
        self._born_read_only = False  # whether it was read-only when it became known
        self._cursor = self._plain = self._probe = -1
        self._fired: list[int] = []  # probes that are yet to be closed
        self._watch = trace.watch(s_dev) if trace else None
        if carried:
            self._cursor, self._plain, self._probe, self._accepted, self._known, self._born_read_only = carried
            return
        try:
            self._cursor = _open_apart(directory_fd)
            self._born_read_only = self._is_read_only()
            self._first_look(scratch_fd)
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """What they are: ``probes+trace``, ``probes``, ``trace`` or ``cursor``."""
        parts = ["probes"] * self._accepted + ["trace"] * (self._watch is not None)
        return "+".join(parts) or "cursor"

    @property
    def spent(self) -> bool:
        """Whether the probe fired and nothing else sees the next error until `renew`."""
        return self._accepted and self._probe < 0 and self._watch is None

    @property
    def need_flush(self) -> bool:
        """Whether errors up to now can be seen by flushing only."""
        return self.spent or (not self._accepted and self._watch is None)

    def let_go_of_fired(self) -> None:
        """Close the probes that have fired, which is to unmount them: it takes as long as the disk takes."""
        while self._fired:
            os.close(self._fired.pop())

    def prepare_flush(self, scratch_fd: int) -> None:
        """Mount the probe that flushes. Not before somebody may flush: it flushes once more when it is let go."""
        if self._accepted and self._plain < 0:
            try:
                self._plain = probes.mount(scratch_fd, volatile=False)
            except private.Replaced:
                raise
            except OSError as error:
                self.refused = error
                self.install(NONE)

    def forgo_flush(self) -> None:
        """Let go of that probe: nobody who may flush is left."""
        if self._plain >= 0:
            plain, self._plain = self._plain, -1
            os.close(plain)

    def flush(self) -> Flushed:
        """Flush the upper, its device's cache too. No state is changed."""
        if self._plain >= 0:
            return Flushed(_syncfs(self._plain), 0)
        told = _syncfs(self._cursor)
        if told is None:
            return Flushed(None, 0)
        again = _syncfs(self._cursor)  # the cursor tells an error once; a flush that fails, fails again
        return Flushed(again, 0 if again else told.errno or errno.EIO)

    def look(self, told: int = 0) -> Sighting | None:
        """An error recorded since the last look, or None: no flush, no write, at most a few microseconds if None.

        `told` is the errno that `flush` was told by the cursor.
        """
        if self._probe >= 0:
            if _syncfs(self._probe) is None:
                return None
            self._fired.append(self._probe)
            self._probe = -1
            events = self._watch.take() if self._watch else None
            known = events.inodes if events and not events.lost else None
            return Sighting(told or errno.EIO, "probe", bool(told), known)
        if self._watch:
            events = self._watch.take()
            if events:
                self._known = not told
                return Sighting(told or errno.EIO, "trace", bool(told), None if events.lost else events.inodes)
        if told and not self._known:
            return Sighting(told, "cursor", True, None)
        if told:
            self._known = False
        return None

    def renew(self, scratch_fd: int) -> Renewal:
        """Consume the error that the probe fired on, and mount a fresh one: the state is changed by `install` only.

        An error may come after it was consumed and before the probe stands, and the host may look at it in between.
        So the cursor is asked once more when the probe stands: if it has nothing to tell, nothing was missed.
        """
        taken = False
        for _ in range(_ROUNDS):
            taken = _syncfs(self._cursor) is not None or taken
            try:
                probe = probes.mount(scratch_fd, volatile=True)
            except OSError as error:
                if error.errno == errno.EIO or isinstance(error, private.Replaced):
                    continue
                return Renewal(None, taken, later=error.errno in _NO_ROOM)
            if _syncfs(self._cursor) is None:
                return Renewal(probe, taken)
            taken = True
            os.close(probe)
        return Renewal(None, taken)

    def install(self, renewal: Renewal) -> None:
        """Use the fresh probe; if there can be none, the cursor from now on."""
        if renewal.probe is not None:
            self._probe = renewal.probe
        elif not renewal.later:
            self._accepted = False
            self.forgo_flush()

    def carry(self) -> Carried:
        """Duplicates of the descriptors, and the state."""
        first, second, third = (os.dup(fd) if fd >= 0 else -1 for fd in (self._cursor, self._plain, self._probe))
        return Carried(first, second, third, self._accepted, self._known, self._born_read_only)

    def turned_read_only(self) -> bool:
        """Whether the upper is read-only and was not at first: syncfs then does nothing, and is 0 (sync_filesystem).

        It takes as long as the upper's server takes, if it has one (fstatvfs(3)).
        """
        return not self._born_read_only and self._is_read_only()

    def close(self) -> None:
        """Close everything, whatever of it fails; raise the last failure."""
        with contextlib.ExitStack() as stack:
            if self._watch:
                stack.callback(self._watch.close)
            for fd in (self._cursor, self._plain, self._probe, *self._fired):
                if fd >= 0:
                    stack.callback(os.close, fd)
            self._cursor = self._plain = self._probe = -1
            self._fired.clear()

    def _is_read_only(self) -> bool:
        return bool(os.fstatvfs(self._cursor).f_flag & os.ST_RDONLY)

    def _first_look(self, scratch_fd: int) -> None:
        try:
            self._probe = probes.mount(scratch_fd, volatile=True)
            return
        except private.Replaced:
            raise
        except OSError as error:
            if error.errno == errno.EIO:
                self._stand_by(scratch_fd)
                return
            self.refused = error
            self.install(NONE)
        told = self.flush().told
        if self._watch:
            self._watch.take()
        if told:
            self.standing = Sighting(told, "standing", True, None)

    def _stand_by(self, scratch_fd: int) -> None:
        """An error stands unseen: with the tracepoint it may go on standing, without it must go."""
        taken = False
        if self._watch:
            self._watch.take()
        else:
            renewal = self.renew(scratch_fd)
            self.install(renewal)
            taken = renewal.taken
        self.standing = Sighting(errno.EIO, "standing", taken, None)


def superblock(directory_fd: int) -> int:
    """The device number of the superblock that the directory is on, as os.makedev builds it.

    Not st_dev: that of a btrfs subvolume, and of some stacked filesystems, is another number. A lock's line in fdinfo
    is where the kernel shows inode->i_sb->s_dev (fs/locks.c, lock_get_status), on a detached mount too, of which
    mountinfo knows nothing. `directory_fd` is a private directory: nobody else holds a flock(2) on it.
    """
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory_fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with open(f"/proc/self/fdinfo/{fd}", "rb", buffering=0) as info:
            line = _LOCK.search(info.read())
        return os.makedev(int(line[1], 16), int(line[2], 16)) if line else os.fstat(fd).st_dev
    finally:
        os.close(fd)


def has_a_name(directory_fd: int) -> bool:
    """Whether the directory can still hold others: it has not been removed, nor its filesystem shut down."""
    try:
        return os.fstat(directory_fd).st_nlink > 0
    except OSError:  # xfs after a shutdown
        return False


def _open_apart(directory_fd: int) -> int:
    """A descriptor of the upper that keeps its superblock busy but not the caller's mount."""
    try:
        apart = mounts.clone(b"", dir_fd=directory_fd)
    except OSError:  # no CAP_SYS_ADMIN, or a mount that must not be cloned: then through the caller's mount
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory_fd)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=apart)
    finally:
        os.close(apart)


def _syncfs(fd: int) -> OSError | None:
    try:
        files.syncfs(fd)
    except OSError as error:
        return error
    return None
