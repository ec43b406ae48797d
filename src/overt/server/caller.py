"""Who asked, and in which system call: what the header of a FUSE request does not say.

A SYNCFS request comes from syncfs(2), from a remount, and from any sync(2) on the machine (umount(2) has DESTROY,
server/ending.py). The caller waits in that call, so the kernel shows its number and arguments (proc(5),
/proc/pid/syscall).
"""

import os
import platform
import signal
import time
from typing import NamedTuple

from overt.host.process import CAPABILITIES, in_user_namespace
from overt.wire import seccomp

# syncfs and sync by architecture; of two numbers the second is the 32-bit one, which the same kernel serves.
_ABIS = {
    "x86_64": (seccomp.AUDIT_ARCH_X86_64, seccomp.AUDIT_ARCH_I386),
    "aarch64": (seccomp.AUDIT_ARCH_AARCH64, seccomp.AUDIT_ARCH_ARM),
}.get(platform.machine(), ())
_SYNCFS = {number for abi, number in seccomp.SYNCFS if abi in _ABIS}
_SYNC = {"x86_64": (162, 36), "aarch64": (81, 36)}.get(platform.machine(), ())
# ioctl(2), and file_getattr(2) and file_setattr(2), which have one number everywhere.
_FLAGS = {"x86_64": (16, 54, 468, 469), "aarch64": (29, 54, 468, 469)}.get(platform.machine(), ())
# chown, fchown, lchown and fchownat; of the 32-bit numbers not lchown's older one, 16, which is another call's that may
# change a file.
_CHOWN = {
    "x86_64": (92, 93, 94, 260, 95, 182, 198, 207, 212, 298), "aarch64": (54, 55, 95, 182, 198, 207, 212, 325)
}.get(platform.machine(), ())  # fmt: skip
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
    def is_seen(self) -> bool:
        """Whether it is known which call it is, and what calls are numbered here."""
        return self.number >= 0 and bool(_CHOWN)

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
    def is_chown(self) -> bool:
        """Whether it is one of those that change a file's owner."""
        return self.number in _CHOWN

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
_GLANCES = 20
"""how often to look which call a thread is in that has not gone to sleep yet, where nobody can wait for it"""
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


def has_capability(tid: int, name: str, *, unseen: bool) -> bool:
    """Whether a thread has a capability as the kernel asks for it (capable(): in the first user namespace).

    `unseen`: the answer for a thread that is not to be seen.
    """
    try:
        with open(f"/proc/{tid}/status", "rb") as file:
            effective = next(int(line.split()[1], 16) for line in file if line.startswith(b"CapEff:"))
        return bool(effective >> CAPABILITIES.index(name) & 1) and not in_user_namespace(tid)
    except OSError:
        return unseen


def glance(tid: int) -> Call:
    """The call that a thread waits in, for the thread that handles requests: it is most likely to sleep in a moment."""
    for _ in range(_GLANCES):
        call = of(tid)
        if not call.is_moving:
            break
        os.sched_yield()  # it may be waiting for the processor that we have
    return call


def wait_for(tid: int) -> Call:
    """The same, but wait until the thread sleeps; not for the thread that handles requests."""
    deadline = time.monotonic() + _PATIENCE
    while (call := of(tid)).is_moving and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    return call
