"""Files and directories relative to directory descriptors."""

import ctypes
import errno
import os
import struct
from typing import NamedTuple

from overt.host.libc import AT_EMPTY_PATH, AT_FDCWD, AT_SYMLINK_NOFOLLOW, check, libc, syscall

# openat2(2)
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

# renameat2(2)
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

# utimensat(2)
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2

# fallocate(2)
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02

FICLONE = 0x40049409
BLKFLSBUF = 0x1261
FS_IOC_GETFSUUID = 0x80111500
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_IOC_FSGETXATTR = 0x801C581F
FS_IOC_FSSETXATTR = 0x401C5820

# sync_file_range(2)
_SYNC_FILE_RANGE_WRITE = 2

# statx(2)
AT_STATX_DONT_SYNC = 0x4000
STATX_BTIME = 0x800
STATX_MNT_ID = 0x1000
STATX_MNT_ID_UNIQUE = 0x4000

_OPEN_HOW = struct.Struct("=QQQ")
_TIMESPECS = struct.Struct("=qqqq")


class Handle(NamedTuple):
    """A file handle, name_to_handle_at(2)."""

    type: int
    bytes: bytes


def openat2(dir_fd: int, path: bytes | str, flags: int, *, mode: int = 0, resolve: int = RESOLVE_BENEATH) -> int:
    """Open `path` from `dir_fd` under the RESOLVE_* rules of openat2(2); return the descriptor (close-on-exec)."""
    how = _OPEN_HOW.pack(flags | os.O_CLOEXEC, mode, resolve)
    return syscall("openat2", dir_fd, os.fsencode(path), how, len(how), about=path)


def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """renameat2(2) with RENAME_NOREPLACE, RENAME_EXCHANGE or RENAME_WHITEOUT."""
    syscall("renameat2", old_dir, old, new_dir, new, flags, about=old)


def statx(dir_fd: int, path: bytes, flags: int, mask: int) -> bytes:
    """The kernel's struct statx, 256 bytes as they are, of `path` (statx(2)); `mask` says which fields are wanted."""
    room = ctypes.create_string_buffer(256)
    check(libc.statx(dir_fd, path, flags, mask, room), path)
    return room.raw


_statx_raw = libc["statx"]  # a function of our own: its types are declared, which spares a microsecond at each call
_statx_raw.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
_Statx = ctypes.c_char * 256
_STATX_MNT_ID = struct.Struct("=I132x II Q")
"""stx_mask, stx_dev_major, stx_dev_minor, stx_mnt_id"""


_STATX_BTIME = struct.Struct("=I76x q I")


def birth_time(dir_fd: int, name: bytes) -> float | None:
    """When the file `name`, or a symlink of that name, was made (statx(2), STATX_BTIME): seconds since the epoch.

    None where the filesystem does not say. OSError.
    """
    granted, seconds, nanoseconds = _STATX_BTIME.unpack_from(statx(dir_fd, name, AT_SYMLINK_NOFOLLOW, STATX_BTIME))
    return seconds + nanoseconds / 1e9 if granted & STATX_BTIME else None


_STATX_ATTRIBUTES = struct.Struct("=8x Q")


def attributes(dir_fd: int, name: bytes) -> int:
    """The stx_attributes (STATX_ATTR_*) of the file `name`, or a symlink of that name; of `dir_fd` itself if empty.

    None are set where the filesystem does not say. OSError.
    """
    room = _Statx()
    check(_statx_raw(dir_fd, name, AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH, 0, room), name)
    found: int = _STATX_ATTRIBUTES.unpack_from(room)[0]
    return found


class Whereabouts(NamedTuple):
    """Which mount a file was opened through."""

    mount: int
    """an id that no other mount has had or will have (Linux 6.8)"""
    device: int
    """st_dev"""


def whereabouts(path: bytes, mask: int = STATX_MNT_ID_UNIQUE) -> Whereabouts:
    """Which mount `path` is on, symlinks followed; no filesystem server is asked (AT_STATX_DONT_SYNC).

    `mask` may be STATX_MNT_ID, for the id that mountinfo and fdinfo show, and which others have had, or 0, for st_dev
    alone, which no filesystem refuses. OSError: EINVAL where the kernel has no such ids.
    """
    room = _Statx()
    check(_statx_raw(AT_FDCWD, path, AT_STATX_DONT_SYNC, mask, room), path)
    granted, major, minor, mount = _STATX_MNT_ID.unpack_from(room)
    if granted & mask != mask:
        raise OSError(errno.EINVAL, "this kernel does not tell mounts apart (statx, Linux 6.8)")
    return Whereabouts(mount, os.makedev(major, minor))


def utimensat(
    dir_fd: int, name: bytes, atime: tuple[int, int], mtime: tuple[int, int], *, follow: bool = False
) -> None:
    """Set times, (seconds, nanoseconds) each; nanoseconds may be UTIME_NOW or UTIME_OMIT (utimensat(2))."""
    times = _TIMESPECS.pack(*atime, *mtime)
    check(libc.utimensat(dir_fd, name, times, 0 if follow else AT_SYMLINK_NOFOLLOW), name)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2): `offset` and `length` in bytes."""
    check(libc.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def syncfs(fd: int) -> None:
    """syncfs(2): flush the filesystem of `fd`, and raise the error that `fd` has not been told of."""
    check(libc.syncfs(fd))


def start_flush(fd: int, offset: int, length: int) -> None:
    """Have the kernel begin to write `length` dirty bytes at `offset`, and wait for nothing (sync_file_range(2)).

    An error of that write-back is left for fsync(2) to tell. OSError: it could not begin.
    """
    check(libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE))


def getdents(fd: int, buffer: bytearray) -> int:
    """Read directory records of `fd` into `buffer` (getdents64(2)); return how many bytes, 0 at the end."""
    into = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    return syscall("getdents64", fd, into, len(buffer))


def name_to_handle(fd: int, name: bytes = b"") -> Handle:
    """The file handle of `fd`, or of `name` in it (name_to_handle_at(2)); EOPNOTSUPP where the filesystem has none."""
    room = bytearray(struct.pack("=Ii", 128, 0) + bytes(128))
    into = (ctypes.c_char * len(room)).from_buffer(room)
    mount_id = ctypes.c_int()
    syscall("name_to_handle_at", fd, name, into, ctypes.byref(mount_id), 0 if name else AT_EMPTY_PATH)
    size, kind = struct.unpack_from("=Ii", room)
    return Handle(kind, bytes(room[8 : 8 + size]))


def open_by_handle(mount_fd: int, handle: Handle, flags: int) -> int:
    """Open a file by its handle through the mount that `mount_fd` is on (CAP_DAC_READ_SEARCH)."""
    packed = struct.pack("=Ii", len(handle.bytes), handle.type) + handle.bytes
    return syscall("open_by_handle_at", mount_fd, packed, flags | os.O_CLOEXEC)
