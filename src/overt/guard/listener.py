"""The listener's end of seccomp user notification: seccomp_unotify(2).

Not fcntl.ioctl: it works on a copy of the buffer, and the room that a notification is received into may be memory that
another process is to find it in, should this one be killed right after.
"""

import ctypes
import struct

from overt.host.libc import check, libc
from overt.wire.record import struct_of
from overt.wire.seccomp import (
    SECCOMP_IOCTL_NOTIF_ID_VALID,
    SECCOMP_IOCTL_NOTIF_RECV,
    SECCOMP_IOCTL_NOTIF_SEND,
    SECCOMP_USER_NOTIF_FLAG_CONTINUE,
    SeccompNotifResp,
)

_RESPONSE = struct_of(SeccompNotifResp)
_ID = struct.Struct("=Q")
_ioctl = libc["ioctl"]  # a function of our own: its types are declared, which spares a microsecond at each call
_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


def _do(listener: int, request: int, address: "int | bytes") -> None:
    check(_ioctl(listener, request, address))


def receive(listener: int, address: int) -> None:
    """Have the kernel write a struct seccomp_notif to `address`, 80 zeroed bytes.

    Call it when the listener is readable, else it waits. OSError: ENOENT if the caller was killed or interrupted
    meanwhile, EINTR.
    """
    _do(listener, SECCOMP_IOCTL_NOTIF_RECV, address)


def answer(listener: int, number: int, error: int) -> None:
    """End the call of notification `number`: it returns 0, or fails with `error` (positive).

    OSError: ENOENT if the caller does not wait any more (killed, or interrupted by a signal).
    """
    _do(listener, SECCOMP_IOCTL_NOTIF_SEND, _RESPONSE.pack(number, 0, -error, 0))


def let_continue(listener: int, number: int) -> None:
    """Have the kernel carry the call out as if there were no filter. OSError as `answer`."""
    _do(listener, SECCOMP_IOCTL_NOTIF_SEND, _RESPONSE.pack(number, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE))


def is_valid(listener: int, number: int) -> bool:
    """Whether the caller still waits: what was looked up by its thread id before this call was then its own."""
    try:
        _do(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, _ID.pack(number))
    except OSError as error:
        if error.errno != 2:
            raise
        return False
    return True
