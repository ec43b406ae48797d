"""Which function serves which opcode. What is not here is answered with ENOSYS, which the kernel remembers (FLUSH)."""

import errno
import os

from overt.fuse.request import Refused, Request
from overt.server import attributes, data, directories, ending, flags, names, syncing
from overt.server.mount import Handler, Mount
from overt.wire import fuse


def init(mount: Mount, request: Request) -> bytes | None:
    """INIT: what was negotiated decides how data flows."""
    try:
        reply = mount.session.init(request)
    except Refused as refusal:
        mount.refused = str(refusal)
        return refusal.reply or None
    mount.passthrough = bool(mount.session.flags & fuse.FUSE_PASSTHROUGH)
    return reply


_SERVED: dict[int, Handler] = {
    fuse.FUSE_INIT: init,
    fuse.FUSE_DESTROY: ending.destroy,
    fuse.FUSE_LOOKUP: names.lookup,
    fuse.FUSE_FORGET: names.forget,
    fuse.FUSE_BATCH_FORGET: names.forget,
    fuse.FUSE_INTERRUPT: names.interrupt,
    fuse.FUSE_READLINK: names.readlink,
    fuse.FUSE_SYMLINK: names.symlink,
    fuse.FUSE_MKNOD: names.mknod,
    fuse.FUSE_MKDIR: names.mkdir,
    fuse.FUSE_UNLINK: names.unlink,
    fuse.FUSE_RMDIR: names.rmdir,
    fuse.FUSE_RENAME: names.rename,
    fuse.FUSE_RENAME2: names.rename,
    fuse.FUSE_LINK: names.link,
    fuse.FUSE_GETATTR: attributes.getattr_,
    fuse.FUSE_SETATTR: attributes.setattr_,
    fuse.FUSE_STATX: attributes.statx,
    fuse.FUSE_STATFS: attributes.statfs,
    fuse.FUSE_GETXATTR: attributes.getxattr,
    fuse.FUSE_LISTXATTR: attributes.listxattr,
    fuse.FUSE_SETXATTR: attributes.setxattr,
    fuse.FUSE_REMOVEXATTR: attributes.removexattr,
    fuse.FUSE_IOCTL: flags.ioctl,
    fuse.FUSE_OPEN: data.open_,
    fuse.FUSE_CREATE: data.create,
    fuse.FUSE_TMPFILE: data.tmpfile,
    fuse.FUSE_RELEASE: data.release,
    fuse.FUSE_READ: data.read,
    fuse.FUSE_WRITE: data.write,
    fuse.FUSE_LSEEK: data.lseek,
    fuse.FUSE_FALLOCATE: data.fallocate,
    fuse.FUSE_COPY_FILE_RANGE: data.copy_file_range,
    fuse.FUSE_OPENDIR: directories.opendir,
    fuse.FUSE_RELEASEDIR: directories.releasedir,
    fuse.FUSE_READDIR: directories.readdir,
    fuse.FUSE_READDIRPLUS: directories.readdirplus,
    fuse.FUSE_FSYNC: syncing.fsync,
    fuse.FUSE_FSYNCDIR: syncing.fsyncdir,
    fuse.FUSE_SYNCFS: syncing.syncfs,
}
_HIGHEST = 64


def unserved(mount: Mount, request: Request) -> bytes | None:
    """An opcode that is not served."""
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


TABLE: list[Handler] = [_SERVED.get(number, unserved) for number in range(_HIGHEST)]
