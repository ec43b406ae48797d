"""Processes, threads, credentials and namespaces."""

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import struct
import threading

from overt.host.libc import check, libc, syscall

PIDFD_THREAD = os.O_EXCL

KCMP_FILE = 0
KCMP_FILES = 2

_FIRST_USER_NAMESPACE = 0xEFFFFFFD

CLONE_FS = 0x200
CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
SECBIT_NO_SETUID_FIXUP = 1 << 2

CAPABILITIES = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap",
    "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner",
    "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice",
    "sys_resource", "sys_time", "sys_tty_config", "mknod", "lease", "audit_write", "audit_control", "setfcap",
    "mac_override", "mac_admin", "syslog", "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf",
    "checkpoint_restore",
)  # fmt: skip
_CAP_HEADER = struct.pack("=Ii", 0x20080522, 0)
_CAP_DATA = struct.Struct("=IIIIII")


def capabilities() -> set[str]:
    """The effective capabilities of the calling thread (capget(2))."""
    bits = _effective()
    return {name for number, name in enumerate(CAPABILITIES) if bits >> number & 1}


def is_capable(name: str) -> bool:
    """Whether the calling thread has a capability."""
    return bool(_effective() >> CAPABILITIES.index(name) & 1)


def _effective() -> int:
    data = ctypes.create_string_buffer(_CAP_DATA.size)
    syscall("capget", _CAP_HEADER, data)
    low, _, _, high, _, _ = _CAP_DATA.unpack(data)
    return int(low | high << 32)


def keep_capabilities(names: set[str]) -> None:
    """Give up, for the calling thread and for good, all capabilities but `names` (capset(2))."""
    bits = sum(1 << number for number, name in enumerate(CAPABILITIES) if name in names & capabilities())
    low, high = bits & 0xFFFFFFFF, bits >> 32
    syscall("capset", _CAP_HEADER, _CAP_DATA.pack(low, low, 0, high, high, 0))


def keep_capabilities_across_setfsuid() -> None:
    """Let setfsuid change who owns new files and whose quota pays, and nothing else (SECBIT_NO_SETUID_FIXUP)."""
    check(libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0))


def set_filesystem_ids(uid: int, gid: int) -> None:
    """setfsuid(2) and setfsgid(2) of the calling thread; neither reports failure."""
    libc.setfsgid(gid)
    libc.setfsuid(uid)


def filesystem_ids() -> tuple[int, int]:
    """The ids that files are made with, (uid, gid), of the calling thread; -1 sets nothing (setfsuid(2))."""
    return libc.setfsuid(-1) & 0xFFFFFFFF, libc.setfsgid(-1) & 0xFFFFFFFF


def in_user_namespace(tid: int | str = "self") -> bool:
    """Whether a thread is in another user namespace than the first one, whose number is fixed (linux/nsfs.h)."""
    return os.stat(f"/proc/{tid}/ns/user").st_ino != _FIRST_USER_NAMESPACE


def no_fuse() -> str | None:
    """Why this process has no /dev/fuse, in words; None if it has."""
    if os.access("/dev/fuse", os.R_OK | os.W_OK):
        return None
    return "may not open /dev/fuse" if os.path.exists("/dev/fuse") else "not without /dev/fuse"


def unshare(flags: int) -> None:
    """unshare(2)."""
    check(libc.unshare(flags))


def setns(fd: int, kind: int) -> None:
    """setns(2): enter the namespace of `fd` (a pidfd or a namespace file)."""
    check(libc.setns(fd, kind))


def open_thread(tid: int) -> int:
    """A pidfd of one thread (pidfd_open(2) with PIDFD_THREAD, since 6.9; before that only of a thread group's
    leader).
    """
    try:
        return syscall("pidfd_open", tid, PIDFD_THREAD)
    except OSError as error:
        if error.errno != 22:
            raise
        return syscall("pidfd_open", tid, 0)


def borrow_fd(pidfd: int, fd: int) -> int:
    """A duplicate of descriptor `fd` of the process behind `pidfd` (pidfd_getfd(2), ptrace permission needed)."""
    return syscall("pidfd_getfd", pidfd, fd, 0)


def compare(one: int, other: int, kind: int, first: int = 0, second: int = 0) -> int:
    """How the kernel orders something of thread `one` and of thread `other`: 0 if it is the same thing, 1 if the first
    is less, 2 if it is greater (kcmp(2)). The order lasts while both exist, and says nothing else.

    KCMP_FILE: the open file descriptions behind their descriptors `first` and `second`; KCMP_FILES: their descriptor
    tables. OSError: EBADF, ESRCH.
    """
    return syscall("kcmp", one, other, kind, first, second)


def make_room_for_descriptors(many: int = 1 << 14) -> None:
    """Have the kernel make this process's table of descriptors for so many, or as many as it may have, now.

    The table doubles whenever it is full, and where threads share it that waits until all processors have been seen to
    leave it alone (fs/file.c, expand_fdtable: synchronize_rcu()): 5 to 16 ms on a quiet machine, at 64 descriptors, at
    256 and so on. To be called before there are threads. Where it cannot be made now (no descriptor is left, no memory,
    no /dev/null) it grows as it ever does: no more is lost than those milliseconds.
    """
    last = min(many, resource.getrlimit(resource.RLIMIT_NOFILE)[0]) - 1
    with contextlib.suppress(OSError), open("/dev/null", "rb", buffering=0) as null:
        os.close(fcntl.fcntl(null, fcntl.F_DUPFD_CLOEXEC, last))


def start(thread: threading.Thread) -> None:
    """Start a thread; OSError (EAGAIN, as pthread_create(3) says it) where there can be no more of them."""
    try:
        thread.start()
    except RuntimeError as problem:  # Python does not say more
        raise OSError(errno.EAGAIN, str(problem)) from None


def die_with_parent(signal: int) -> None:
    """Have the kernel send `signal` to this process when the thread that forked it ends (prctl(2))."""
    check(libc.prctl(PR_SET_PDEATHSIG, signal, 0, 0, 0))


def set_name(name: str) -> None:
    """What ps(1) and /proc/PID/comm call this process; at most 15 bytes (prctl(2))."""
    check(libc.prctl(PR_SET_NAME, name.encode(), 0, 0, 0))


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends: daemons stay findable (prctl(2), subreaper)."""
    check(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def children(pid: int | str = "self") -> list[int]:
    """The processes whose parent this one is, by whichever of its threads; none if it is gone (proc(5))."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += map(int, file.read().split())
    except (FileNotFoundError, ProcessLookupError):
        return []
    return found


def outlive_mount_namespace() -> None:
    """Keep a descriptor of this process's mount namespace for as long as the process lives. OSError.

    A FUSE server that is killed as the last process in its mount namespace ends its own mount. The kernel closes files
    and unmounts in do_exit(), as task work, what was put off last first (kernel/task_work.c): the mount before
    /dev/fuse. Where umount waits for an answer (DESTROY, fs/fuse/inode.c, fuse_conn_destroy) nobody can give it, and
    the process stays for ever. With the namespace kept by a descriptor, the mount is put off once more, and goes after
    all files are closed.
    """
    os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
