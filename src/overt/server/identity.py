"""On whose behalf files are made.

The upper's kernel gives a new file its owner, charges a quota, and applies a umask or a default ACL; so it is told who
asks. It is told who writes, too, because root may use blocks that others may not. setfsuid belongs to a thread and the
umask to the process, and only the thread that handles requests uses them. Capabilities stay (SECBIT_NO_SETUID_FIXUP):
what the caller may do was decided by the kernel in front of us (default_permissions), as overlayfs decides it before it
acts with the mounter's credentials.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from overt.host.process import set_filesystem_ids

_uid = _gid = 0
_umask = -1


def act_as(uid: int, gid: int) -> None:
    """Use space as this user from here on."""
    global _uid, _gid
    if uid != _uid or gid != _gid:
        set_filesystem_ids(uid, gid)
        _uid, _gid = uid, gid


def become(uid: int, gid: int, umask: int) -> None:
    """Make files as this user from here on."""
    global _umask
    act_as(uid, gid)
    if umask != _umask:
        os.umask(umask)
        _umask = umask


def become_myself() -> None:
    """For a thread that was started while the one that handles requests acted for somebody: act for the server."""
    set_filesystem_ids(os.geteuid(), os.getegid())


def become_root() -> None:
    """Make files as the server itself: copies, whiteouts."""
    act_as(0, 0)


@contextmanager
def of_worker(uid: int, gid: int) -> Iterator[None]:
    """Use space as this user for a while; for a thread that does not handle requests."""
    if uid or gid:
        set_filesystem_ids(uid, gid)
    try:
        yield
    finally:
        if uid or gid:
            set_filesystem_ids(0, 0)
