"""On whose behalf files are made.

The upper's kernel gives a new file its owner, charges a quota, and applies a umask or a default ACL; so it is told who
asks. It is told who writes, too, because root may use blocks that others may not. setfsuid belongs to a thread, and so
does the umask of a thread that has left the process's (`own_umask`): whoever handles requests does that first.
Capabilities stay (SECBIT_NO_SETUID_FIXUP): what the caller may do was decided by the kernel in front of us
(default_permissions), as overlayfs decides it before it acts with the mounter's credentials.
"""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from overt.host.process import CLONE_FS, filesystem_ids, set_filesystem_ids, unshare


class _Thread(threading.local):
    """Whom the calling thread acts for."""

    uid = gid = 0
    umask = -1
    apart = False


_me = _Thread()


def own_umask() -> None:
    """Give the calling thread a umask and a working directory of its own (unshare(2), CLONE_FS); before it handles
    requests.
    """
    if not _me.apart:
        unshare(CLONE_FS)
        _me.apart = True


def act_as(uid: int, gid: int) -> None:
    """Use space as this user from here on; EOVERFLOW for one that this user namespace does not have."""
    me = _me
    if uid != me.uid or gid != me.gid:
        set_filesystem_ids(uid, gid)
        me.uid, me.gid = uid, gid
        if filesystem_ids() != (uid, gid):  # setfsuid(2) does not say so
            set_filesystem_ids(0, 0)
            me.uid = me.gid = 0
            raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))


def become(uid: int, gid: int, umask: int) -> None:
    """Make files as this user from here on."""
    act_as(uid, gid)
    if umask != _me.umask:
        os.umask(umask)
        _me.umask = umask


def become_myself() -> None:
    """For a thread that was started while the one that handles requests acted for somebody: act for the server."""
    set_filesystem_ids(os.geteuid(), os.getegid())


def become_root() -> None:
    """Make files as the server itself: copies, whiteouts."""
    act_as(0, 0)


@contextmanager
def of_worker(uid: int, gid: int) -> Iterator[None]:
    """Use space as this user for a while: work that is not done in a request's turn (`Mount.submit`)."""
    before = _me.uid, _me.gid
    act_as(uid, gid)
    try:
        yield
    finally:
        act_as(*before)
