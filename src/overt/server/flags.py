"""File attribute flags: IOCTL.

The kernel asks for lsattr(1) and chattr(1) with requests of its own (fs/fuse/ioctl.c, fuse_fileattr_get,
fuse_fileattr_set), each between an OPEN or OPENDIR and a RELEASE, after it has looked who may do so. Their `arg` is 0;
where it is a program's pointer, an older kernel (before 5.13) passes on what nobody has looked at.
"""

import errno
import os

from overt.fuse.request import Request
from overt.host.files import FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR, FS_IOC_GETFLAGS, FS_IOC_SETFLAGS
from overt.server import identity
from overt.server.mount import Mount
from overt.tree import flags
from overt.tree.copyup import copy_up

Reply = bytes | memoryview | None

_GET = (FS_IOC_GETFLAGS, FS_IOC_FSGETXATTR)
_SET = (FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR)


def changes(request: Request) -> bool:
    """Whether an IOCTL changes anything."""
    return request.arg[2] in _SET


def ioctl(mount: Mount, request: Request) -> Reply:
    """IOCTL: flags are got and set; ENOTTY for all else, as kernel overlayfs has it."""
    _, _, command, argument, _, room = request.arg
    if argument or command not in (*_GET, *_SET):
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
    tree = mount.tree
    node = tree.node(request.nodeid)
    identity.become_root()
    if command in _GET:
        found = flags.get(tree, node, command)
        if len(found) != room:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return mount.session.ioctl(request.unique, 0, found)
    copy_up(tree, node)
    try:
        flags.put(tree, node, command, bytes(request.payload))
    finally:
        tree.changed.append(node.id)  # of the time of change the kernel does not know
    return mount.session.ioctl(request.unique, 0)
