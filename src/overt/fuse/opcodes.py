"""One row for each opcode: what follows the header of such a request, and what answers it.

The decoder, the dispatcher, the documentation and the tests all read this table. A request is

    InHeader | record | names, each with its NUL | payload | extensions

where the extensions are as long as the header says, so that whatever stands before them can be checked to the byte.
Rows are for FUSE 7.46; `since` says which minor version brought an opcode, and one that is newer than what was
negotiated is as unknown as one without a row. Not here, because nothing that overt negotiates makes the kernel send
them: SETUPMAPPING and REMOVEMAPPING (DAX), NOTIFY_REPLY (answers a retrieve), CUSE.
"""

from typing import Any, NamedTuple

from overt.wire import fuse

# What a name may be. Neither kind may be empty.
COMPONENT = "component"  # one step of a path: no "/", and neither "." nor ".."
STEP = "step"  # a component; "." and ".." too if FUSE_EXPORT_SUPPORT was negotiated
TEXT = "text"  # any bytes: an xattr's name, a symlink's target, and "/", which TMPFILE carries in place of a name

# The payload's limit is what was negotiated: Session.max_write.
MAX_WRITE = -1
XATTR_SIZE_MAX = 65536  # <linux/limits.h>
IOCTL_SIZE_MAX = (1 << 14) - 1  # _IOC_SIZEBITS
FORGETS_MAX = 1 << 20  # no limit in the protocol: as many as the reader's buffer holds

# What answers a request; each but NONE and INIT is the name of the Session method that encodes it.
NONE = "none"
INIT = "init"
EMPTY = "empty"
ENTRY = "entry"
ATTR = "attr"
STATX = "statx"
OPENED = "opened"
CREATED = "created"
DATA = "data"
WRITTEN = "written"
COPIED = "copied"
STATFS = "statfs"
XATTR = "xattr_size"  # when the request's size is 0; otherwise DATA
LOCK = "lock"
LSEEK = "lseek"
BMAP = "bmap"
IOCTL = "ioctl"
POLL = "poll"


class Payload(NamedTuple):
    """How long a request's payload is: as the record's field says, in units of so many bytes, between two limits."""

    field: str
    unit: int
    least: int  # units
    most: int  # units, or MAX_WRITE


class Opcode(NamedTuple):
    number: int
    name: str
    record: type[tuple[Any, ...]] | None = None
    names: tuple[str, ...] = ()
    reply: str = EMPTY
    payload: Payload | None = None
    since: int = 31


OPCODES = (
    Opcode(fuse.FUSE_LOOKUP, "LOOKUP", None, (STEP,), ENTRY),
    Opcode(fuse.FUSE_FORGET, "FORGET", fuse.ForgetIn, (), NONE),
    Opcode(fuse.FUSE_GETATTR, "GETATTR", fuse.GetattrIn, (), ATTR),
    Opcode(fuse.FUSE_SETATTR, "SETATTR", fuse.SetattrIn, (), ATTR),
    Opcode(fuse.FUSE_READLINK, "READLINK", None, (), DATA),
    Opcode(fuse.FUSE_SYMLINK, "SYMLINK", None, (COMPONENT, TEXT), ENTRY),
    Opcode(fuse.FUSE_MKNOD, "MKNOD", fuse.MknodIn, (COMPONENT,), ENTRY),
    Opcode(fuse.FUSE_MKDIR, "MKDIR", fuse.MkdirIn, (COMPONENT,), ENTRY),
    Opcode(fuse.FUSE_UNLINK, "UNLINK", None, (COMPONENT,)),
    Opcode(fuse.FUSE_RMDIR, "RMDIR", None, (COMPONENT,)),
    Opcode(fuse.FUSE_RENAME, "RENAME", fuse.RenameIn, (COMPONENT, COMPONENT)),
    Opcode(fuse.FUSE_LINK, "LINK", fuse.LinkIn, (COMPONENT,), ENTRY),
    Opcode(fuse.FUSE_OPEN, "OPEN", fuse.OpenIn, (), OPENED),
    Opcode(fuse.FUSE_READ, "READ", fuse.ReadIn, (), DATA),
    Opcode(fuse.FUSE_WRITE, "WRITE", fuse.WriteIn, (), WRITTEN, Payload("size", 1, 0, MAX_WRITE)),
    Opcode(fuse.FUSE_STATFS, "STATFS", None, (), STATFS),
    Opcode(fuse.FUSE_RELEASE, "RELEASE", fuse.ReleaseIn),
    Opcode(fuse.FUSE_FSYNC, "FSYNC", fuse.FsyncIn),
    # without FUSE_SETXATTR_EXT the record is SetxattrInCompat
    Opcode(fuse.FUSE_SETXATTR, "SETXATTR", fuse.SetxattrIn, (TEXT,), EMPTY, Payload("size", 1, 0, XATTR_SIZE_MAX)),
    Opcode(fuse.FUSE_GETXATTR, "GETXATTR", fuse.GetxattrIn, (TEXT,), XATTR),
    Opcode(fuse.FUSE_LISTXATTR, "LISTXATTR", fuse.GetxattrIn, (), XATTR),
    Opcode(fuse.FUSE_REMOVEXATTR, "REMOVEXATTR", None, (TEXT,)),
    Opcode(fuse.FUSE_FLUSH, "FLUSH", fuse.FlushIn),
    # a kernel older than 7.36 sends an InitInCompat, a newer one may send more than an InitIn
    Opcode(fuse.FUSE_INIT, "INIT", fuse.InitIn, (), INIT),
    Opcode(fuse.FUSE_OPENDIR, "OPENDIR", fuse.OpenIn, (), OPENED),
    Opcode(fuse.FUSE_READDIR, "READDIR", fuse.ReadIn, (), DATA),
    Opcode(fuse.FUSE_RELEASEDIR, "RELEASEDIR", fuse.ReleaseIn),
    Opcode(fuse.FUSE_FSYNCDIR, "FSYNCDIR", fuse.FsyncIn),
    Opcode(fuse.FUSE_GETLK, "GETLK", fuse.LkIn, (), LOCK),
    Opcode(fuse.FUSE_SETLK, "SETLK", fuse.LkIn),
    Opcode(fuse.FUSE_SETLKW, "SETLKW", fuse.LkIn),
    Opcode(fuse.FUSE_ACCESS, "ACCESS", fuse.AccessIn),
    Opcode(fuse.FUSE_CREATE, "CREATE", fuse.CreateIn, (COMPONENT,), CREATED),
    Opcode(fuse.FUSE_INTERRUPT, "INTERRUPT", fuse.InterruptIn, (), NONE),
    Opcode(fuse.FUSE_BMAP, "BMAP", fuse.BmapIn, (), BMAP),
    Opcode(fuse.FUSE_DESTROY, "DESTROY"),
    Opcode(fuse.FUSE_IOCTL, "IOCTL", fuse.IoctlIn, (), IOCTL, Payload("in_size", 1, 0, IOCTL_SIZE_MAX)),
    Opcode(fuse.FUSE_POLL, "POLL", fuse.PollIn, (), POLL),
    Opcode(fuse.FUSE_BATCH_FORGET, "BATCH_FORGET", fuse.BatchForgetIn, (), NONE, Payload("count", 16, 1, FORGETS_MAX)),
    Opcode(fuse.FUSE_FALLOCATE, "FALLOCATE", fuse.FallocateIn),
    Opcode(fuse.FUSE_READDIRPLUS, "READDIRPLUS", fuse.ReadIn, (), DATA),
    Opcode(fuse.FUSE_RENAME2, "RENAME2", fuse.Rename2In, (COMPONENT, COMPONENT)),
    Opcode(fuse.FUSE_LSEEK, "LSEEK", fuse.LseekIn, (), LSEEK),
    Opcode(fuse.FUSE_COPY_FILE_RANGE, "COPY_FILE_RANGE", fuse.CopyFileRangeIn, (), WRITTEN),
    Opcode(fuse.FUSE_SYNCFS, "SYNCFS", fuse.SyncfsIn, since=34),
    Opcode(fuse.FUSE_TMPFILE, "TMPFILE", fuse.CreateIn, (TEXT,), CREATED, since=37),
    Opcode(fuse.FUSE_STATX, "STATX", fuse.StatxIn, (), STATX, since=39),
    Opcode(fuse.FUSE_COPY_FILE_RANGE_64, "COPY_FILE_RANGE_64", fuse.CopyFileRangeIn, (), COPIED, since=45),
)

NAMES = {row.number: row.name for row in OPCODES}
# A reply to one of these would be taken for the answer to something else.
UNANSWERED = frozenset(row.number for row in OPCODES if row.reply == NONE) | {fuse.FUSE_NOTIFY_REPLY}
