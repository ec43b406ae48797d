"""Weak references to superblocks: fanotify(7) marks that report nothing and are gone when their superblock is.

A device number says which superblock it is only while that lives: the kernel gives the number to the next one. A
descriptor would keep the superblock, and its mount, from being let go. A mark of FAN_MARK_FILESYSTEM keeps neither. The
kernel removes it when the superblock ends (generic_shutdown_super, fsnotify_sb_delete), and gives the number away only
after that (kill_anon_super, free_anon_bdev; fs/super.c). The group's fdinfo shows the marks that are left
(fs/notify/fdinfo.c). A mark of ignored events only has no event to report, and costs nobody anything.
"""

import ctypes
import os
import re

from overt.host.libc import AT_FDCWD, check, libc

# fanotify_init(2)
_FAN_CLOEXEC = 0x01
_FAN_UNLIMITED_MARKS = 0x20

# fanotify_mark(2)
_FAN_MARK_ADD = 0x01
_FAN_MARK_IGNORED_MASK = 0x20
_FAN_MARK_IGNORED_SURV_MODIFY = 0x40
_FAN_MARK_FILESYSTEM = 0x100
_FAN_OPEN = 0x20

_FLAGS = _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM | _FAN_MARK_IGNORED_MASK | _FAN_MARK_IGNORED_SURV_MODIFY
_LINE = re.compile(rb"^fanotify sdev:([0-9a-f]+) ", re.MULTILINE)
_MINOR_BITS = 20


class Marks:
    """A group of marks. It is the descriptor's: a process that is forked has the same one. Any thread may use it."""

    def __init__(self) -> None:
        """OSError: EPERM without CAP_SYS_ADMIN, ENOSYS where the kernel has no fanotify, EMFILE."""
        group = libc.fanotify_init(ctypes.c_uint(_FAN_CLOEXEC | _FAN_UNLIMITED_MARKS), ctypes.c_uint(os.O_RDONLY))
        self._fd = check(group)

    def put(self, path: bytes) -> None:
        """Mark the superblock that `path` is on, symlinks followed; it may be marked already.

        OSError: EACCES where the file must not be read, ENOENT.
        """
        check(libc.fanotify_mark(self._fd, ctypes.c_uint(_FLAGS), ctypes.c_uint64(_FAN_OPEN), AT_FDCWD, path), path)

    def left(self) -> set[int]:
        """The device numbers (as os.makedev builds them) of the superblocks that were marked and have not ended."""
        with open(f"/proc/self/fdinfo/{self._fd}", "rb") as info:
            numbers = [int(each, 16) for each in _LINE.findall(info.read())]
        return {os.makedev(each >> _MINOR_BITS, each & (1 << _MINOR_BITS) - 1) for each in numbers}

    def close(self) -> None:
        """Let go of all marks."""
        os.close(self._fd)
