"""A connection to the kernel: /dev/fuse, and a mount on it that is not in the tree yet.

`fuseblk` is preferred, because the kernel sends syncfs(2) to such a server (since 6.18, d3906d8f3cee). It wants a block
device that nobody else has: a loop device over one page of memory, which lets go of itself with the mount
(AUTOCLEAR). Where plain `fuse` can have SYNCFS (FUSE_HAS_SYNCFS, 989db66818a4) or no loop device is to be had, it is
plain `fuse`.
"""

import errno
import os
from typing import NamedTuple

from overt.host import loop, mounts
from overt.overlay.options import Options
from overt.server.layers import Refusal, access_times
from overt.server.source import named


class Connection(NamedTuple):
    """`fuse`: /dev/fuse; `mount`: the detached mount; `device`: st_dev of its files, 0 if not known yet."""

    fuse: int
    mount: int
    kind: str
    device: int


_page = -1


def _backing() -> int:
    """One page of memory behind all loop devices of this process; nobody reads or writes it."""
    global _page
    if _page < 0:
        _page = os.memfd_create("overt", os.MFD_CLOEXEC)
        os.ftruncate(_page, 4096)
    return _page


def connect(options: Options) -> Connection:
    """Make the connection; raise `Refusal`."""
    if options.view.context is not None and not os.path.isdir("/sys/fs/selinux/booleans"):
        raise Refusal(f"context={options.view.context}: SELinux is not on here: mount without it")
    try:
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        advice = "load the fuse module" if error.errno == errno.ENOENT else "run as root, or give access to it"
        raise Refusal(f"/dev/fuse: {error.strerror}: {advice}") from None
    try:
        try:
            return _mount_block(fuse, options)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # no fault of the kind of mount
                raise Refusal(f"mount: {error.strerror}") from None
            problem = error
        try:
            return Connection(fuse, _mount(fuse, "fuse", options), "fuse", 0)
        except OSError as error:
            raise Refusal(
                f"mount: {error.strerror} (as fuseblk: {problem.strerror}): mounting needs CAP_SYS_ADMIN"
            ) from None
    except Refusal:
        os.close(fuse)
        raise


def _mount_block(fuse: int, options: Options) -> Connection:
    device = loop.attach(_backing())
    try:
        number = os.stat(device.fd).st_rdev
        with named(options.source, device.path):
            mount = _mount(fuse, "fuseblk", options)
        return Connection(fuse, mount, "fuseblk", number)
    finally:
        os.close(device.fd)


def _mount(fuse: int, kind: str, options: Options) -> int:
    settings: list[tuple[str, str | int | None]] = [
        ("source", options.source),
        ("subtype", "overt"),
        ("fd", str(fuse)),
        ("rootmode", "40755"),
        ("user_id", str(os.geteuid())),
        ("group_id", str(os.getegid())),
        ("allow_other", None),
        ("default_permissions", None),
    ]
    if options.upper is None:
        settings.append(("ro", None))
    if options.view.context is not None:
        settings.append(("context", options.view.context))
    # With an upper only this mount of it is read-only: a read-only superblock is never asked to sync, and could not be
    # told of an error.
    attributes = (
        (mounts.MOUNT_ATTR_RDONLY if options.read_only else 0)
        | (mounts.MOUNT_ATTR_NOSUID if options.no_suid else 0)
        | (mounts.MOUNT_ATTR_NODEV if options.no_dev else 0)
        | (mounts.MOUNT_ATTR_NOEXEC if options.no_exec else 0)
        | (mounts.MOUNT_ATTR_NOSYMFOLLOW if options.no_symfollow else 0)
        | access_times(options)
    )
    return mounts.new_mount(kind, settings, attributes)
