"""Probes: kernel overlays of our own on an upper, to flush it and to see its errors without taking them from the host.

syncfs(2) on a descriptor of the upper flushes, tells and consumes, all at once. Two overlay mounts part these:

    ordinary    syncfs flushes the upper, its device cache too; it tells only what ->sync_fs itself returned (a failed
                device flush, a journal being aborted) and marks nothing as seen
    volatile    syncfs fails iff the upper has recorded an error since this overlay was mounted, for ever; it flushes
                nothing and marks nothing (335d3fc57941, Linux 5.11)

A volatile overlay refuses (EIO) to be mounted while the upper has an error that nobody has seen.

Each stands on directories made for it, which are removed as soon as the mount exists, and it is detached: neither the
disk nor the mount table shows it, and it goes with its descriptor.

Somebody else may write there: a container, where the directory is on a volume of its own. So no symbolic link is
followed and no mount entered (host/private.py), and the kernel is given the directories themselves, as descriptors: it
empties what it is given to work in. Only what is known by name is removed; whatever else is there stays.
"""

import contextlib
import os

from overt.host import files, mounts, private

# `userxattr` lets the same mount work in a user namespace; it implies redirect_dir=nofollow and metacopy=off, and is
# refused together with them.
_OPTIONS: list[tuple[str, str | int | None]] = [("userxattr", None), ("index", "off"), ("xino", "off")]
_DIRTY = "dirty"
_INCOMPAT = "work/work/incompat"
_MADE = (
    f"{_INCOMPAT}/volatile/{_DIRTY}", f"{_INCOMPAT}/volatile", _INCOMPAT, "work/work", "work", "upper", "lower",
)  # fmt: skip
"""what we and the kernel make for a probe, from the inside out: `_DIRTY` is a file, all else directories"""
_DIRECTORY = os.O_PATH | os.O_DIRECTORY


def mount(scratch_fd: int, *, volatile: bool) -> int:
    """Mount a probe on the filesystem of the directory `scratch_fd`; return a descriptor of its root.

    Raises OSError: EIO for a volatile one while an error stands unseen on the upper, EINVAL and others where kernel
    overlayfs does not accept the upper, `private.Replaced` if somebody has put something else in the place of its
    directories, and what mkdir(2) below `scratch_fd` raises. What could not be removed of them stays there.
    """
    name = f"probe-{os.urandom(8).hex()}"
    try:
        base = private.make(scratch_fd, name, _DIRECTORY)
        try:
            return _mount_over(base, volatile)
        finally:
            os.close(base)
    finally:
        _remove(scratch_fd, name)


def _remove(scratch_fd: int, name: str) -> None:
    """Remove a probe's directories, as far as they are what is known; one descriptor at a time, there may be few."""
    for path in (*(f"{name}/{made}" for made in _MADE), name):
        parent, _, last = path.rpartition("/")
        with contextlib.suppress(OSError):  # it was not made; or it stays, and whoever owns `scratch_fd` is told by it
            holder = files.openat2(scratch_fd, parent or ".", _DIRECTORY, resolve=private.BENEATH)
            try:
                (os.unlink if last == _DIRTY else os.rmdir)(last, dir_fd=holder)
            finally:
                os.close(holder)


def _mount_over(base: int, volatile: bool) -> int:
    options = list(_OPTIONS)
    with contextlib.ExitStack() as stack:
        for key, part in (("lowerdir", "lower"), ("upperdir", "upper"), ("workdir", "work")):
            fd = private.make(base, part, _DIRECTORY)
            stack.callback(os.close, fd)
            options.append((key, f"/proc/self/fd/{fd}"))
        if volatile:
            options.append(("volatile", None))
        mount_fd = mounts.new_mount("overlay", options)
        stack.callback(os.close, mount_fd)
        return os.open(f"/proc/self/fd/{mount_fd}", os.O_RDONLY | os.O_DIRECTORY)
