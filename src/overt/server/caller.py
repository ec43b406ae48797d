"""Who asked, and in which system call: what the header of a FUSE request does not say.

A SYNCFS request comes from syncfs(2), from a remount, and from any sync(2) on the machine (umount(2) has DESTROY,
server/ending.py). The caller waits in that call, so the kernel shows its number and arguments (proc(5),
/proc/pid/syscall).
"""

import platform
import signal
import time
from typing import NamedTuple

# syncfs and sync by architecture; the second number is the 32-bit one, which the same kernel serves.
_SYNCFS = {"x86_64": (306, 344), "aarch64": (267, 388)}.get(platform.machine(), ())
_SYNC = {"x86_64": (162, 36), "aarch64": (81, 36)}.get(platform.machine(), ())
# ioctl(2), and file_getattr(2) and file_setattr(2), which have one number everywhere.
_FLAGS = {"x86_64": (16, 54, 468, 469), "aarch64": (29, 54, 468, 469)}.get(platform.machine(), ())
# mount(2), and fsconfig(2), which has one number everywhere.
_REMOUNT = {"x86_64": (165, 21, 431), "aarch64": (40, 21, 431)}.get(platform.machine(), ())


class Call(NamedTuple):
    """A thread and the system call it waits in. `tid` is 0 for a thread outside our pid namespace."""

    tid: int
    number: int
    argument: int

    @property
    def is_moving(self) -> bool:
        """Whether the thread had not gone to sleep yet: it will be seen in a moment."""
        return self.number == _MOVING

    @property
    def is_sync(self) -> bool:
        """Whether it is sync(2)."""
        return self.number in _SYNC

    @property
    def is_syncfs(self) -> bool:
        """Whether it is syncfs(2); `argument` is its descriptor then."""
        return self.number in _SYNCFS

    @property
    def is_about_flags(self) -> bool:
        """Whether it is one that may ask for a file's flags, or set them; it opens no file for its caller."""
        return self.number in _FLAGS

    @property
    def is_question(self) -> bool:
        """Whether somebody wants to know whether data is safe; one whose call cannot be seen is taken to want it."""
        return self.is_syncfs or self.number in (_UNSEEN, _MOVING)

    @property
    def is_remount(self) -> bool:
        """Whether it is mount(2) or fsconfig(2), which remounts."""
        return self.number in _REMOUNT


_UNSEEN, _MOVING, _NONE = -1, -2, -3
_PATIENCE = 1.0
"""seconds for a caller to go to sleep"""
_PAUSE = 1e-4
UNKNOWN = Call(0, _UNSEEN, -1)
NOBODY = Call(0, _NONE, -1)


def of(tid: int) -> Call:
    """The call that thread `tid` waits in. It asks before it sleeps, so it may still be running: `is_moving` then."""
    if not tid:
        return UNKNOWN
    try:
        with open(f"/proc/{tid}/syscall", "rb", 0) as file:
            words = file.read(64).split()
        if words == [b"running"]:
            return Call(tid, _MOVING, -1)
        return Call(tid, int(words[0]), int(words[1], 16))
    except (OSError, ValueError, IndexError):  # gone, or not ours to see: an unknown call is treated as a question
        return Call(tid, _UNSEEN, -1)


def is_dying(tid: int) -> bool:
    """Whether SIGKILL is pending for a thread (the kernel makes every fatal signal one); so is one that is gone.

    Of a thread outside our pid namespace (0) that is not to be seen: no.
    """
    if not tid:
        return False
    try:
        with open(f"/proc/{tid}/status", "rb") as file:
            pending = [int(line.split()[1], 16) for line in file if line.startswith((b"SigPnd:", b"ShdPnd:"))]
    except OSError:
        return True
    return any(bits >> signal.SIGKILL - 1 & 1 for bits in pending)


def groups_of(tid: int) -> list[int]:
    """The supplementary groups of a thread; none if it is not to be seen."""
    try:
        with open(f"/proc/{tid}/status", "rb") as file:
            return [int(word) for line in file if line.startswith(b"Groups:") for word in line.split()[1:]]
    except OSError:
        return []


def wait_for(tid: int) -> Call:
    """The same, but wait until the thread sleeps; not for the thread that handles requests."""
    deadline = time.monotonic() + _PATIENCE
    while (call := of(tid)).is_moving and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    return call
