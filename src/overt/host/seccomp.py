"""A seccomp filter that notifies: seccomp(2), seccomp_unotify(2)."""

import ctypes
import errno
import platform
import struct

from overt.host.libc import NUMBERS, check, libc, syscall

PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER = 1
_NEW_LISTENER = 8
_RET_USER_NOTIF = 0x7FC00000
_RET_ALLOW = 0x7FFF0000
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
_LINE = struct.Struct("=HBBI")


def notify(call: str) -> int:
    """Have system call `call` of this thread, and of what it starts, notified from now on; the listener.

    By the native number only, whatever the architecture of the caller says: for a process that makes no other calls.
    OSError: EBUSY if it has a listener already, ENOSYS where the number is not known.
    """
    number = NUMBERS.get(call)
    if number is None:
        raise OSError(errno.ENOSYS, f"{call} is not known on {platform.machine()}")
    lines = (
        (_LOAD, 0, 0, 0),  # the number, at offset 0 of struct seccomp_data
        (_JUMP_IF_EQUAL, 0, 1, number),
        (_RETURN, 0, 0, _RET_USER_NOTIF),
        (_RETURN, 0, 0, _RET_ALLOW),
    )
    room = ctypes.create_string_buffer(b"".join(_LINE.pack(*line) for line in lines))
    program = struct.pack("=HxxxxxxQ", len(lines), ctypes.addressof(room))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    return syscall("seccomp", _SET_MODE_FILTER, _NEW_LISTENER, program)
