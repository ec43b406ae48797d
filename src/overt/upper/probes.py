"""Probes: kernel overlays of our own on an upper, to flush it and to see its errors without taking them from the host.

syncfs(2) on a descriptor of the upper flushes, tells and consumes, all at once. Two overlay mounts part these:

    ordinary    syncfs flushes the upper, its device cache too; it tells only what ->sync_fs itself returned (a failed
                device flush, a journal being aborted) and marks nothing as seen
    volatile    syncfs fails iff the upper has recorded an error since this overlay was mounted, for ever; it flushes
                nothing and marks nothing (335d3fc57941, Linux 5.11)

A volatile overlay refuses (EIO) to be mounted while the upper has an error that nobody has seen.

Each stands on directories made for it, which are removed as soon as the mount exists, and it is detached: neither the
disk nor the mount table shows it, and it goes with its descriptor.
"""

import contextlib
import errno
import os
import shutil

from overt.host import mounts

# `userxattr` lets the same mount work in a user namespace; it implies redirect_dir=nofollow and metacopy=off, and is
# refused together with them.
_OPTIONS: list[tuple[str, str | int | None]] = [("userxattr", None), ("index", "off"), ("xino", "off")]
_DIRTY = "work/work/incompat/volatile/dirty"
_MADE = ("lower", "upper", "work/work/incompat/volatile", "work/work/incompat", "work/work", "work", "")
"""the directories that we and the kernel make for a probe, from the inside out; `_DIRTY` is a file"""


def mount(scratch_fd: int, *, volatile: bool) -> int:
    """Mount a probe on the filesystem of the directory `scratch_fd`; return a descriptor of its root.

    Raises OSError: EIO for a volatile one while an error stands unseen on the upper, EINVAL and others where kernel
    overlayfs does not accept the upper, and what mkdir(2) and rmdir(2) below `scratch_fd` raise.
    """
    name = f"probe-{os.urandom(8).hex()}"
    os.mkdir(name, 0o700, dir_fd=scratch_fd)
    try:
        base = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=scratch_fd)
        try:
            root = _mount_over(base, volatile)
        finally:
            os.close(base)
    except OSError:
        _remove(scratch_fd, name)
        raise
    try:
        _remove(scratch_fd, name)
    except OSError:
        os.close(root)
        raise
    return root


def _remove(scratch_fd: int, name: str) -> None:
    """Remove a probe's directories: they are known, and so it takes no descriptor, of which there may be no more."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{name}/{_DIRTY}", dir_fd=scratch_fd)
    for part in _MADE:
        try:
            os.rmdir(f"{name}/{part}", dir_fd=scratch_fd)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            shutil.rmtree(name, dir_fd=scratch_fd)  # the kernel has made something that we do not know of
            return


def _mount_over(base: int, volatile: bool) -> int:
    options = list(_OPTIONS)
    for key, part in (("lowerdir", "lower"), ("upperdir", "upper"), ("workdir", "work")):
        os.mkdir(part, 0o700, dir_fd=base)
        options.append((key, f"/proc/self/fd/{base}/{part}"))
    if volatile:
        options.append(("volatile", None))
    mount_fd = mounts.new_mount("overlay", options)
    try:
        return os.open(f"/proc/self/fd/{mount_fd}", os.O_RDONLY | os.O_DIRECTORY)
    finally:
        os.close(mount_fd)
