"""Seccomp user notification: the records and numbers of <linux/seccomp.h>, and syncfs(2) as each ABI numbers it.

A class is named after its C struct (SeccompNotif is struct seccomp_notif) and a constant keeps its name, so that the
test can ask a C compiler about every one of them. The six arguments of struct seccomp_data are fields here, `args0` to
`args5`.
"""

from typing import NamedTuple

from .record import I32, I64, U32, U64


class SeccompData(NamedTuple):
    """A system call as a filter sees it."""

    nr: I32
    arch: U32
    instruction_pointer: U64
    args0: U64
    args1: U64
    args2: U64
    args3: U64
    args4: U64
    args5: U64


class SeccompNotif(NamedTuple):
    """A thread that waits in a system call. The kernel wants the room for it zeroed."""

    id: U64
    pid: U32
    """a thread id, in the pid namespace of whoever receives; 0 if the thread is not in it"""
    flags: U32
    data: SeccompData


class SeccompNotifResp(NamedTuple):
    """What the call returns: `val`, or the negative errno `error`; or, with the flag, what the kernel makes of it."""

    id: U64
    val: I64
    error: I32
    flags: U32


SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_NEW_LISTENER = 8
SECCOMP_RET_USER_NOTIF = 0x7FC00000
SECCOMP_RET_ALLOW = 0x7FFF0000

SECCOMP_IOCTL_NOTIF_RECV = 0xC0502100
SECCOMP_IOCTL_NOTIF_SEND = 0xC0182101
SECCOMP_IOCTL_NOTIF_ID_VALID = 0x40082102

SECCOMP_USER_NOTIF_FLAG_CONTINUE = 1

# <linux/audit.h>; x32 has the arch of x86-64, and this bit in the number.
AUDIT_ARCH_X86_64 = 0xC000003E
AUDIT_ARCH_I386 = 0x40000003
AUDIT_ARCH_AARCH64 = 0xC00000B7
AUDIT_ARCH_ARM = 0x40000028
X32_SYSCALL_BIT = 0x40000000

SYNCFS = frozenset(
    {
        (AUDIT_ARCH_X86_64, 306),
        (AUDIT_ARCH_X86_64, X32_SYSCALL_BIT | 306),
        (AUDIT_ARCH_I386, 344),
        (AUDIT_ARCH_AARCH64, 267),
        (AUDIT_ARCH_ARM, 373),
    }
)
"""(arch, nr) of syncfs(2): asm/unistd_64.h, unistd_32.h, unistd_x32.h; asm-generic/unistd.h; arm's syscall.tbl"""
