"""Mounts as descriptors (fsopen(2), fsmount(2), open_tree(2)): nothing has a name until it is ready to be used.

A detached mount lives as long as its descriptor, so a process that dies half way leaves nothing behind.
"""

import errno
import os
import re
import struct
from collections.abc import Iterable

from overt.host.libc import AT_EMPTY_PATH, AT_FDCWD, check, libc, syscall

FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_SET_FD = 5
FSCONFIG_CMD_CREATE = 6
FSCONFIG_CMD_RECONFIGURE = 7
FSPICK_CLOEXEC = 1
FSPICK_EMPTY_PATH = 8
MOVE_MOUNT_F_EMPTY_PATH = 0x04
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC

MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOSUID = 0x02
MOUNT_ATTR_NODEV = 0x04
MOUNT_ATTR_NOEXEC = 0x08
MOUNT_ATTR_RELATIME = 0
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR__ATIME = 0x70
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_NOSYMFOLLOW = 0x200000

MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

MS_REC = 16384
MS_PRIVATE = 1 << 18

_MOUNT_ATTR = struct.Struct("=QQQQ")


def _explain(context: int, error: OSError) -> OSError:
    """Add to `error` what the kernel wrote into the context's log, if it wrote anything."""
    lines = []
    while True:
        try:
            lines.append(os.read(context, 4096).decode(errors="replace").strip())
        except OSError:  # ENODATA: the log is empty
            break
    words = "; ".join(line[2:] if line[1:2] == " " else line for line in lines)
    return OSError(error.errno, f"{os.strerror(error.errno or 0)}{': ' + words if words else ''}")


def new_mount(kind: str, options: Iterable[tuple[str, str | int | None]], attributes: int = 0) -> int:
    """Make a detached mount of filesystem type `kind`; return its descriptor (an O_PATH one of its root).

    `options` are (key, value): a string; an int for a descriptor handed over; None for a flag. `attributes` are
    MOUNT_ATTR_* bits. Raises OSError whose text carries the kernel's own explanation. (fsopen(2), fsconfig(2))
    """
    context = syscall("fsopen", kind.encode(), FSOPEN_CLOEXEC, about=kind)
    try:
        try:
            for key, value in options:
                if value is None:
                    syscall("fsconfig", context, FSCONFIG_SET_FLAG, key.encode(), None, 0)
                elif isinstance(value, int):
                    syscall("fsconfig", context, FSCONFIG_SET_FD, key.encode(), None, value)
                else:
                    syscall("fsconfig", context, FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0)
            syscall("fsconfig", context, FSCONFIG_CMD_CREATE, None, None, 0)
            return syscall("fsmount", context, FSMOUNT_CLOEXEC, attributes)
        except OSError as error:
            raise _explain(context, error) from None
    finally:
        os.close(context)


def is_known(kind: str) -> bool:
    """Whether this kernel has the filesystem type `kind`, or may load it. (fsopen(2): ENODEV)"""
    try:
        os.close(syscall("fsopen", kind.encode(), FSOPEN_CLOEXEC))
    except OSError as error:
        return error.errno != errno.ENODEV
    return True


def clone(path: str | bytes, *, dir_fd: int = AT_FDCWD, attributes: int = 0) -> int:
    """A detached clone of the mount at `path`, submounts left out (as overlayfs clones its layers); its descriptor.

    `attributes` (MOUNT_ATTR_*) are set on the clone. (open_tree(2), mount_setattr(2))
    """
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (0 if path else AT_EMPTY_PATH)
    fd = syscall("open_tree", dir_fd, os.fsencode(path), flags, about=path)
    if attributes:
        try:
            set_attributes(fd, attributes)
        except OSError:
            os.close(fd)
            raise
    return fd


def set_attributes(fd: int, add: int = 0, remove: int = 0) -> None:
    """Set and clear MOUNT_ATTR_* on the mount whose root `fd` is (mount_setattr(2))."""
    if add & MOUNT_ATTR__ATIME:
        remove |= MOUNT_ATTR__ATIME  # the ways to treat access times are one field, not single bits
    packed = _MOUNT_ATTR.pack(add, remove, 0, 0)
    syscall("mount_setattr", fd, b"", AT_EMPTY_PATH, packed, len(packed))


def reconfigure(root: int, flag: str) -> None:
    """Remount the superblock of the mount whose root `root` is, with `flag` (ro, rw); waits for who is in syncfs(2).

    Raises OSError: EBUSY for `ro` while somebody can write. (fspick(2), fsconfig(2))
    """
    context = syscall("fspick", root, b"", FSPICK_CLOEXEC | FSPICK_EMPTY_PATH)
    try:
        syscall("fsconfig", context, FSCONFIG_SET_FLAG, flag.encode(), None, 0)
        syscall("fsconfig", context, FSCONFIG_CMD_RECONFIGURE, None, None, 0)
    finally:
        os.close(context)


def attach(mount_fd: int, path: str | bytes) -> None:
    """Give a detached mount its place in the tree (move_mount(2))."""
    syscall("move_mount", mount_fd, b"", AT_FDCWD, os.fsencode(path), MOVE_MOUNT_F_EMPTY_PATH, about=path)


def umount(path: str | bytes, flags: int = 0) -> None:
    """umount2(2) without following a symlink at `path`."""
    check(libc.umount2(os.fsencode(path), flags | UMOUNT_NOFOLLOW), path)


def unescape(path: bytes) -> bytes:
    """A word of /proc/self/mountinfo as it is: there blanks, commas and backslashes are octal escapes (proc(5))."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), path)


def superblock_options(kind: str) -> list[list[bytes]]:
    """The options of each superblock of filesystem type `kind` that is mounted in this namespace."""
    with open("/proc/self/mountinfo", "rb") as table:
        lines = [line for line in table if b" - %b " % kind.encode() in line]
    return [list(map(unescape, line.rpartition(b" ")[2].strip().split(b","))) for line in lines]


def make_private() -> None:
    """Stop mount events from travelling between this namespace and its parent."""
    check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
