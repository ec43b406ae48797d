"""Run a command whose sync(2) does nothing: without_sync.py COMMAND ARGUMENT...

sync(2) visits every filesystem of the machine, also the ones that other tests have made hang, and asks nothing of a
single mount. Some programs call it in passing (stressors, postinst scripts). A seccomp filter answers 0 in its
place, for the command and all that it starts; syncfs(2) and fsync(2) are real.
"""

import ctypes
import os
import platform
import struct
import sys

_CALLS = {"x86_64": (0xC000003E, 162), "aarch64": (0xC00000B7, 81)}  # AUDIT_ARCH_*, the number of sync(2)

_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
_ALLOW, _ANSWER_0 = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO with the errno 0
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2


def install() -> None:
    """Put the filter on this process; OSError without CAP_SYS_ADMIN."""
    architecture, number = _CALLS[platform.machine()]
    steps = (
        (_LOAD, 0, 0, 4),  # seccomp_data.arch
        (_EQUAL, 0, 3, architecture),
        (_LOAD, 0, 0, 0),  # seccomp_data.nr
        (_EQUAL, 0, 1, number),
        (_RETURN, 0, 0, _ANSWER_0),
        (_RETURN, 0, 0, _ALLOW),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = struct.pack("@HP", len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp filter")


if __name__ == "__main__":
    install()
    os.execvp(sys.argv[1], sys.argv[1:])
