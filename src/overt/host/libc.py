"""The one door to libc: calls release the GIL, and a result of -1 becomes OSError.

ctypes drops the GIL around a call, which is not a detail here: a server that blocks in a system call on its own mount
with the GIL held would wait for an answer that only it can give.
"""

import ctypes
import os
import platform
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
_syscall = libc["syscall"]  # a function of our own: its types are declared once, and not found out at each call
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long, *[ctypes.c_void_p] * 6]
_NOTHING = (None,) * 6

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

# Numbers of the calls that came before the unified table (asm-generic/unistd.h, x86/entry/syscalls/syscall_64.tbl).
_OLDER = {
    "x86_64": {
        "capset": 126, "capget": 125, "name_to_handle_at": 303, "open_by_handle_at": 304, "renameat2": 316,
        "getdents64": 217, "setfsuid": 122, "setfsgid": 123, "kcmp": 312, "syncfs": 306, "seccomp": 317,
    },
    "aarch64": {
        "capset": 91, "capget": 90, "name_to_handle_at": 264, "open_by_handle_at": 265, "renameat2": 276,
        "getdents64": 61, "setfsuid": 151, "setfsgid": 152, "kcmp": 272, "syncfs": 267, "seccomp": 277,
    },
}  # fmt: skip
# ... and since Linux 5.1 every architecture numbers new calls alike.
_UNIFIED = {
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "pidfd_open": 434, "openat2": 437, "pidfd_getfd": 438, "mount_setattr": 442,
}  # fmt: skip
NUMBERS: dict[str, int] = {**_OLDER.get(platform.machine(), {}), **_UNIFIED}


def check(result: int, *names: object) -> int:
    """Return `result`, or raise the OSError that errno names if it is negative.

    `names` (at most two: what the call was about) become the exception's filename and filename2.
    """
    if result >= 0:
        return result
    code = ctypes.get_errno()
    if not names:
        raise OSError(code, os.strerror(code))
    if len(names) == 1:
        raise OSError(code, os.strerror(code), names[0])
    raise OSError(code, os.strerror(code), names[0], None, names[1])


def syscall(name: str, *args: Any, about: object = None) -> int:
    """Make the system call `name`; raise OSError (ENOSYS where its number is not known on this architecture)."""
    number = NUMBERS.get(name)
    if number is None:
        raise OSError(38, f"{name} is not known on {platform.machine()}")
    result: int = _syscall(number, *args, *_NOTHING[len(args) :])
    return check(result) if about is None else check(result, about)
