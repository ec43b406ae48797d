"""Open file descriptions that are yet to be told of an error.

The agent never sees an open(2). While an overlay has no error nobody needs to know which descriptions there are: all of
them count from the same value. When an error becomes known, and before the first is told of it, the descriptor tables
of all processes are walked once, and each open description of the overlay is held by a duplicate. Who is told is let
go; who is not held came later, and counts from the overlay's cursor as it is then. (In a socket's queue a description
is in nobody's table: that one is missed.)

A duplicate keeps the file open, its locks too, so those that nobody else has any more are let go by the next walks.

kcmp(2) says whether two descriptors are of the same description, and sorts them: so a description is found among many
in a few comparisons. The order holds as long as they exist, which those that are held do.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from stat import S_IRUSR, S_IWUSR

from overt.guard.closing import Closer
from overt.guard.room import Room
from overt.host import process
from overt.ledger import Description

_MISSES = 2
SECONDS = 5.0
"""of a walk, at most: whoever calls on an upper with a new error waits for it"""


class Held:
    """One overlay's. Whoever owns the overlay serialises."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, Description, str]] = []
        """(descriptor of ours, position, name in the store), in the kernel's order"""
        self._missed: dict[int, int] = {}

    def find(self, tid: int, fd: int) -> tuple[int, bool]:
        """Where descriptor `fd` of thread `tid` is in `entries`, or belongs, and whether it is there.

        OSError: EBADF, ESRCH.
        """
        low, high, own = 0, len(self.entries), os.getpid()
        while low < high:
            middle = (low + high) // 2
            order = process.compare(tid, own, process.KCMP_FILE, fd, self.entries[middle][0])
            if order == 0:
                return middle, True
            if order == 1:
                high = middle
            else:
                low = middle + 1
        return low, False

    def add(self, fd: int, description: Description, name: str) -> bool:
        """Hold the description behind our own descriptor `fd`; False if it is held already."""
        at, there = self.find(os.getpid(), fd)
        if not there:
            self.entries.insert(at, (fd, description, name))
        return not there

    def take(self, at: int) -> tuple[int, str]:
        """Take an entry out: our descriptor, which is the caller's to give back, and its name in the store."""
        fd, _, name = self.entries.pop(at)
        self._missed.pop(fd, None)
        return fd, name

    def prune(self, seen: set[int]) -> list[tuple[int, str]]:
        """Take out the entries that several walks have not seen (`seen`: our descriptors), as `take` does."""
        gone = []
        for at in reversed(range(len(self.entries))):
            fd = self.entries[at][0]
            self._missed[fd] = 0 if fd in seen else self._missed.get(fd, 0) + 1
            if self._missed[fd] >= _MISSES:
                gone.append(self.take(at))
        return gone


def walk(skip: set[int], seconds: float = SECONDS) -> Iterator[tuple[int, int, bytes]]:
    """All descriptors of the machine that syncfs(2) would take: (thread id, descriptor, /proc/TID/fd/N).

    Those of the processes `skip` are left out. What ends meanwhile is passed over. A table is walked once, however many
    threads and processes share it. The smallest come first, so that whoever makes huge ones is in the way of nobody
    else. Raises TimeoutError after `seconds`: what was not come to by then is not known.
    """
    deadline = time.monotonic() + seconds
    for sharers in _tables(skip, deadline):
        left = sharers
        while left:
            tid = left[0]
            for number in _numbers(tid):
                _look_at_the_clock(deadline)
                place = b"/proc/%d/fd/%s" % (tid, number.encode())
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    if not is_path(place):
                        yield tid, int(number), place
            # Where the one that was looked at has ended, or has another table by now, the others were not seen.
            left = [other for other in left[1:] if _differ(tid, other)]


def is_path(place: bytes) -> bool:
    """Whether the descriptor `place` (/proc/TID/fd/N) is an O_PATH one, with which syncfs(2) fails (EBADF). OSError."""
    if os.lstat(place).st_mode & (S_IRUSR | S_IWUSR):  # how it was opened (proc_pid_fd(5))
        return False
    with open(place.replace(b"/fd/", b"/fdinfo/"), "rb") as info:  # O_PATH, or the access mode 3
        flags = next(line.split()[1] for line in info if line.startswith(b"flags:"))
    return bool(int(flags, 8) & os.O_PATH)


class Loans:
    """Duplicates of containers' descriptors. Each takes room until it is closed, which may be never (guard/closing.py).

    Any thread may call any method.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._closer = Closer()

    def borrow(
        self, party: str, tid: int, fd: int, is_right: Callable[[bytes], bool], *, told: bool = False
    ) -> int:  # fmt: skip
        """A duplicate of descriptor `fd` of thread `tid`, to be given back; -1 if `party` has no room (see `Room`).

        OSError if it is not the one any more that was meant: `is_right` says so of a path of it.
        """
        if not self._room.take(party, told=told):
            return -1
        try:
            ours = _duplicate(tid, fd)
        except BaseException:
            self._room.give(party, told=told)
            raise
        try:
            if not is_right(b"/proc/self/fd/%d" % ours):
                raise FileNotFoundError(errno.ENOENT, f"descriptor {fd} of {tid} is another file now")
        except BaseException:
            self.give_back(party, ours, told=told)
            raise
        return ours

    def drop(self, party: str, fd: int) -> None:
        """Have a duplicate closed that was not borrowed here, and has no room. Waits for no filesystem."""
        self._closer.close(party, fd)

    def give_back(self, party: str, fd: int, *, told: bool = False) -> None:
        """Have a duplicate closed, and its room given back then. Waits for no filesystem."""
        self._closer.close(party, fd, partial(self._room.give, party, told=told))


def _duplicate(tid: int, fd: int) -> int:
    pidfd = process.open_thread(tid)
    try:
        return process.borrow_fd(pidfd, fd)
    finally:
        os.close(pidfd)


def _numbers(tid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{tid}/fd")
    except OSError:  # it has ended
        return []


def _tables(skip: set[int], deadline: float) -> list[list[int]]:
    """The threads that share a descriptor table, for each table, by its size. Raises TimeoutError."""
    found: list[list[int]] = []
    for pid in sorted({int(name) for name in os.listdir("/proc") if name.isdigit()} - skip):
        here = _enter(pid, found)
        for tid in _other_threads(pid):
            _look_at_the_clock(deadline)
            if here and not _differ(pid, tid):
                here.append(tid)
            else:
                _enter(tid, found)
    return sorted(found, key=_size)


def _enter(tid: int, found: list[list[int]]) -> list[int]:
    """Put a thread to those that share its table; who they are, nobody if it has ended. `found` is in kcmp's order."""
    low, high = 0, len(found)
    while low < high:
        middle = (low + high) // 2
        try:
            order = process.compare(tid, found[middle][0], process.KCMP_FILES)
        except OSError:
            if _differ(tid, tid):
                return []
            del found[middle][0]  # that one has ended
            if not found[middle]:
                del found[middle]
                high -= 1
            continue
        if order == 0:
            found[middle].append(tid)
            return found[middle]
        if order == 1:
            high = middle
        else:
            low = middle + 1
    found.insert(low, [tid])
    return found[low]


def _differ(one: int, other: int) -> bool:
    """Whether two threads have different tables, as far as both are there."""
    try:
        return process.compare(one, other, process.KCMP_FILES) != 0
    except OSError:
        return True


def _other_threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task") if int(name) != pid]
    except OSError:  # it has ended
        return []


def _size(sharers: list[int]) -> int:
    """How many descriptors are in a table (proc_pid_fd(5): the directory's size, Linux 6.2)."""
    try:
        return os.stat(f"/proc/{sharers[0]}/fd").st_size
    except OSError:  # it has ended
        return 0


def _look_at_the_clock(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(errno.ETIMEDOUT, "the descriptors of the machine are too many to be looked at")
