"""The filesystems that a lab disk can carry: one row each.

The options serve two ends. A disk should be ready soon and then keep quiet, so that what is counted at the disk was
caused by the test: nothing is discarded at mkfs, and ext4 does not go on to initialise inode tables behind our back.
And file data must be told from metadata by what is in it: btrfs would keep a small file inside a metadata leaf (and a
failed leaf is another story than a failed page), so max_inline=0.
"""

import errno
import os
import shutil
from collections.abc import Mapping
from typing import NamedTuple


class Filesystem(NamedTuple):
    kind: str  # as mount(2) calls it
    make: tuple[str, ...]  # mkfs and its options; the device follows
    package: str  # Debian's name of the package that has it
    mount_options: str
    least: int  # bytes


_EXT4 = ("mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard")

FILESYSTEMS: Mapping[str, Filesystem] = {
    "ext4": Filesystem("ext4", _EXT4, "e2fsprogs", "noinit_itable", 8 << 20),
    "ext4-nojournal": Filesystem("ext4", (*_EXT4, "-O", "^has_journal"), "e2fsprogs", "noinit_itable", 8 << 20),
    "xfs": Filesystem("xfs", ("mkfs.xfs", "-q", "-f", "-K"), "xfsprogs", "nouuid", 300 << 20),
    "btrfs": Filesystem("btrfs", ("mkfs.btrfs", "-q", "-f", "-K"), "btrfs-progs", "max_inline=0", 128 << 20),
}


def program(name: str, package: str) -> str:
    """The path of a mkfs, looked for in the administrator's directories too; FileNotFoundError names the package."""
    path = shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")))
    if path is None:
        raise FileNotFoundError(errno.ENOENT, f"{name} is not installed; the package {package} has it")
    return path
