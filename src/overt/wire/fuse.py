"""The FUSE protocol's records and constants, 7.31 to 7.46, as <linux/fuse.h> names them.

A request is an InHeader, the opcode's record, then names (each with its NUL), then a payload, then extensions; a reply
is an OutHeader and the opcode's out record. Notifications are replies with unique 0 whose error field is the
notification's code. Which record belongs to which opcode is said in `overt.fuse.opcodes`, not here.

A class is named after its C struct (FsyncIn is struct fuse_fsync_in) and a constant keeps its name, so that the test
can ask a C compiler about every one of them without a table of its own.

Two liberties are taken. Seconds of a timestamp, and the offset of LSEEK, are declared signed, although the header says
uint64_t: the kernel casts them to a signed type, and files from before 1970 exist. And padding belongs to the field
before it (see `overt.wire.record`).
"""

from typing import NamedTuple

from .record import (
    I32,
    I64,
    U16,
    U16P2,
    U16P22,
    U32,
    U32P4,
    U32P8,
    U32P12,
    U32P16,
    U32P28,
    U32P44,
    U32P112,
    U64,
    U64P8,
)

FUSE_KERNEL_VERSION = 7
FUSE_ROOT_ID = 1
FUSE_MIN_READ_BUFFER = 8192
FUSE_MAX_NR_SECCTX = 31
FUSE_EXT_GROUPS = 32
FUSE_COMPAT_SETXATTR_IN_SIZE = 8
FUSE_IOCTL_MAX_IOV = 256

# A request that is sent again (FUSE_HAS_RESEND) carries its old unique with this bit set; so has the reply.
FUSE_UNIQUE_RESEND = 1 << 63
# uid and gid of a request whose caller cannot be expressed on an idmapped mount.
FUSE_INVALID_UIDGID = 0xFFFFFFFF

# opcodes
FUSE_LOOKUP = 1
FUSE_FORGET = 2
FUSE_GETATTR = 3
FUSE_SETATTR = 4
FUSE_READLINK = 5
FUSE_SYMLINK = 6
FUSE_MKNOD = 8
FUSE_MKDIR = 9
FUSE_UNLINK = 10
FUSE_RMDIR = 11
FUSE_RENAME = 12
FUSE_LINK = 13
FUSE_OPEN = 14
FUSE_READ = 15
FUSE_WRITE = 16
FUSE_STATFS = 17
FUSE_RELEASE = 18
FUSE_FSYNC = 20
FUSE_SETXATTR = 21
FUSE_GETXATTR = 22
FUSE_LISTXATTR = 23
FUSE_REMOVEXATTR = 24
FUSE_FLUSH = 25
FUSE_INIT = 26
FUSE_OPENDIR = 27
FUSE_READDIR = 28
FUSE_RELEASEDIR = 29
FUSE_FSYNCDIR = 30
FUSE_GETLK = 31
FUSE_SETLK = 32
FUSE_SETLKW = 33
FUSE_ACCESS = 34
FUSE_CREATE = 35
FUSE_INTERRUPT = 36
FUSE_BMAP = 37
FUSE_DESTROY = 38
FUSE_IOCTL = 39
FUSE_POLL = 40
FUSE_NOTIFY_REPLY = 41
FUSE_BATCH_FORGET = 42
FUSE_FALLOCATE = 43
FUSE_READDIRPLUS = 44
FUSE_RENAME2 = 45
FUSE_LSEEK = 46
FUSE_COPY_FILE_RANGE = 47
FUSE_SETUPMAPPING = 48
FUSE_REMOVEMAPPING = 49
FUSE_SYNCFS = 50
FUSE_TMPFILE = 51
FUSE_STATX = 52
FUSE_COPY_FILE_RANGE_64 = 53

# flags of INIT; bits 32 to 63 travel in flags2
FUSE_ASYNC_READ = 1 << 0
FUSE_POSIX_LOCKS = 1 << 1
FUSE_FILE_OPS = 1 << 2
FUSE_ATOMIC_O_TRUNC = 1 << 3
FUSE_EXPORT_SUPPORT = 1 << 4
FUSE_BIG_WRITES = 1 << 5
FUSE_DONT_MASK = 1 << 6
FUSE_SPLICE_WRITE = 1 << 7
FUSE_SPLICE_MOVE = 1 << 8
FUSE_SPLICE_READ = 1 << 9
FUSE_FLOCK_LOCKS = 1 << 10
FUSE_HAS_IOCTL_DIR = 1 << 11
FUSE_AUTO_INVAL_DATA = 1 << 12
FUSE_DO_READDIRPLUS = 1 << 13
FUSE_READDIRPLUS_AUTO = 1 << 14
FUSE_ASYNC_DIO = 1 << 15
FUSE_WRITEBACK_CACHE = 1 << 16
FUSE_NO_OPEN_SUPPORT = 1 << 17
FUSE_PARALLEL_DIROPS = 1 << 18
FUSE_HANDLE_KILLPRIV = 1 << 19
FUSE_POSIX_ACL = 1 << 20
FUSE_ABORT_ERROR = 1 << 21
FUSE_MAX_PAGES = 1 << 22
FUSE_CACHE_SYMLINKS = 1 << 23
FUSE_NO_OPENDIR_SUPPORT = 1 << 24
FUSE_EXPLICIT_INVAL_DATA = 1 << 25
FUSE_MAP_ALIGNMENT = 1 << 26
FUSE_SUBMOUNTS = 1 << 27
FUSE_HANDLE_KILLPRIV_V2 = 1 << 28
FUSE_SETXATTR_EXT = 1 << 29
FUSE_INIT_EXT = 1 << 30
FUSE_SECURITY_CTX = 1 << 32
FUSE_HAS_INODE_DAX = 1 << 33
FUSE_CREATE_SUPP_GROUP = 1 << 34
FUSE_HAS_EXPIRE_ONLY = 1 << 35
FUSE_DIRECT_IO_ALLOW_MMAP = 1 << 36
FUSE_PASSTHROUGH = 1 << 37
FUSE_NO_EXPORT_SUPPORT = 1 << 38
FUSE_HAS_RESEND = 1 << 39
FUSE_ALLOW_IDMAP = 1 << 40
FUSE_OVER_IO_URING = 1 << 41
FUSE_REQUEST_TIMEOUT = 1 << 42
FUSE_HAS_SYNCFS = 1 << 43

# which fields of a SetattrIn are meant
FATTR_MODE = 1 << 0
FATTR_UID = 1 << 1
FATTR_GID = 1 << 2
FATTR_SIZE = 1 << 3
FATTR_ATIME = 1 << 4
FATTR_MTIME = 1 << 5
FATTR_FH = 1 << 6
FATTR_ATIME_NOW = 1 << 7
FATTR_MTIME_NOW = 1 << 8
FATTR_LOCKOWNER = 1 << 9
FATTR_CTIME = 1 << 10
FATTR_KILL_SUIDGID = 1 << 11

# open_flags of an OpenOut
FOPEN_DIRECT_IO = 1 << 0
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_NONSEEKABLE = 1 << 2
FOPEN_CACHE_DIR = 1 << 3
FOPEN_STREAM = 1 << 4
FOPEN_NOFLUSH = 1 << 5
FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6
FOPEN_PASSTHROUGH = 1 << 7

FUSE_RELEASE_FLUSH = 1 << 0
FUSE_RELEASE_FLOCK_UNLOCK = 1 << 1
FUSE_GETATTR_FH = 1 << 0
FUSE_LK_FLOCK = 1 << 0
FUSE_WRITE_CACHE = 1 << 0
FUSE_WRITE_LOCKOWNER = 1 << 1
FUSE_WRITE_KILL_SUIDGID = 1 << 2
FUSE_READ_LOCKOWNER = 1 << 1
FUSE_IOCTL_COMPAT = 1 << 0
FUSE_IOCTL_UNRESTRICTED = 1 << 1
FUSE_IOCTL_RETRY = 1 << 2
FUSE_IOCTL_32BIT = 1 << 3
FUSE_IOCTL_DIR = 1 << 4
FUSE_IOCTL_COMPAT_X32 = 1 << 5
FUSE_POLL_SCHEDULE_NOTIFY = 1 << 0
FUSE_FSYNC_FDATASYNC = 1 << 0
FUSE_ATTR_SUBMOUNT = 1 << 0
FUSE_ATTR_DAX = 1 << 1
FUSE_OPEN_KILL_SUIDGID = 1 << 0
FUSE_SETXATTR_ACL_KILL_SGID = 1 << 0
FUSE_EXPIRE_ONLY = 1 << 0

# codes of notifications
FUSE_NOTIFY_POLL = 1
FUSE_NOTIFY_INVAL_INODE = 2
FUSE_NOTIFY_INVAL_ENTRY = 3
FUSE_NOTIFY_STORE = 4
FUSE_NOTIFY_RETRIEVE = 5
FUSE_NOTIFY_DELETE = 6
FUSE_NOTIFY_RESEND = 7
FUSE_NOTIFY_INC_EPOCH = 8
FUSE_NOTIFY_PRUNE = 9

# ioctls of /dev/fuse
FUSE_DEV_IOC_CLONE = 0x8004E500  # _IOR(229, 0, uint32_t)
FUSE_DEV_IOC_BACKING_OPEN = 0x4010E501  # _IOW(229, 1, struct fuse_backing_map)
FUSE_DEV_IOC_BACKING_CLOSE = 0x4004E502  # _IOW(229, 2, uint32_t)
FUSE_DEV_IOC_SYNC_INIT = 0xE503  # _IO(229, 3)


class InHeader(NamedTuple):
    len: U32
    opcode: U32
    unique: U64
    nodeid: U64
    uid: U32
    gid: U32
    pid: U32
    total_extlen: U16P2  # of the extensions at the request's end, in units of 8 bytes


class OutHeader(NamedTuple):
    len: U32
    error: I32
    unique: U64


class Attr(NamedTuple):
    ino: U64
    size: U64
    blocks: U64
    atime: I64
    mtime: I64
    ctime: I64
    atimensec: U32
    mtimensec: U32
    ctimensec: U32
    mode: U32
    nlink: U32
    uid: U32
    gid: U32
    rdev: U32
    blksize: U32
    flags: U32


class EntryOut(NamedTuple):
    nodeid: U64
    generation: U64
    entry_valid: U64
    attr_valid: U64
    entry_valid_nsec: U32
    attr_valid_nsec: U32
    attr: Attr


class ForgetIn(NamedTuple):
    nlookup: U64


class ForgetOne(NamedTuple):
    nodeid: U64
    nlookup: U64


class BatchForgetIn(NamedTuple):
    count: U32P4  # type: ignore[assignment]


class GetattrIn(NamedTuple):
    getattr_flags: U32P4
    fh: U64


class AttrOut(NamedTuple):
    attr_valid: U64
    attr_valid_nsec: U32P4
    attr: Attr


class SxTime(NamedTuple):
    tv_sec: I64
    tv_nsec: U32P4


class Statx(NamedTuple):
    mask: U32
    blksize: U32
    attributes: U64
    nlink: U32
    uid: U32
    gid: U32
    mode: U16P2
    ino: U64
    size: U64
    blocks: U64
    attributes_mask: U64
    atime: SxTime
    btime: SxTime
    ctime: SxTime
    mtime: SxTime
    rdev_major: U32
    rdev_minor: U32
    dev_major: U32
    dev_minor: U32P112


class StatxIn(NamedTuple):
    getattr_flags: U32P4
    fh: U64
    sx_flags: U32
    sx_mask: U32


class StatxOut(NamedTuple):
    attr_valid: U64
    attr_valid_nsec: U32
    flags: U32P16
    stat: Statx


class MknodIn(NamedTuple):
    mode: U32
    rdev: U32
    umask: U32P4


class MkdirIn(NamedTuple):
    mode: U32
    umask: U32


class RenameIn(NamedTuple):
    newdir: U64


class Rename2In(NamedTuple):
    newdir: U64
    flags: U32P4


class LinkIn(NamedTuple):
    oldnodeid: U64


class SetattrIn(NamedTuple):
    valid: U32P4
    fh: U64
    size: U64
    lock_owner: U64
    atime: I64
    mtime: I64
    ctime: I64
    atimensec: U32
    mtimensec: U32
    ctimensec: U32
    mode: U32P4
    uid: U32
    gid: U32P4


class OpenIn(NamedTuple):
    flags: U32
    open_flags: U32


class CreateIn(NamedTuple):
    flags: U32
    mode: U32
    umask: U32
    open_flags: U32


class OpenOut(NamedTuple):
    fh: U64
    open_flags: U32
    backing_id: I32


class ReleaseIn(NamedTuple):
    fh: U64
    flags: U32
    release_flags: U32
    lock_owner: U64


class FlushIn(NamedTuple):
    fh: U64P8
    lock_owner: U64


class ReadIn(NamedTuple):
    fh: U64
    offset: U64
    size: U32
    read_flags: U32
    lock_owner: U64
    flags: U32P4


class WriteIn(NamedTuple):
    fh: U64
    offset: U64
    size: U32
    write_flags: U32
    lock_owner: U64
    flags: U32P4


class WriteOut(NamedTuple):
    size: U32P4


class Kstatfs(NamedTuple):
    blocks: U64
    bfree: U64
    bavail: U64
    files: U64
    ffree: U64
    bsize: U32
    namelen: U32
    frsize: U32P28


class StatfsOut(NamedTuple):
    st: Kstatfs


class FsyncIn(NamedTuple):
    fh: U64
    fsync_flags: U32P4


class SyncfsIn(NamedTuple):
    padding: U64


class SetxattrIn(NamedTuple):
    size: U32
    flags: U32
    setxattr_flags: U32P4


class SetxattrInCompat(NamedTuple):
    """The first FUSE_COMPAT_SETXATTR_IN_SIZE bytes of a SetxattrIn: all that is sent without FUSE_SETXATTR_EXT."""

    size: U32
    flags: U32


class GetxattrIn(NamedTuple):
    size: U32P4


class GetxattrOut(NamedTuple):
    size: U32P4


class FileLock(NamedTuple):
    start: U64
    end: U64
    type: U32
    pid: U32


class LkIn(NamedTuple):
    fh: U64
    owner: U64
    lk: FileLock
    lk_flags: U32P4


class LkOut(NamedTuple):
    lk: FileLock


class AccessIn(NamedTuple):
    mask: U32P4


class InitIn(NamedTuple):
    major: U32
    minor: U32
    max_readahead: U32
    flags: U32
    flags2: U32P44


class InitInCompat(NamedTuple):
    """The first 16 bytes of an InitIn: all that a kernel older than 7.36 sends."""

    major: U32
    minor: U32
    max_readahead: U32
    flags: U32


class InitOut(NamedTuple):
    major: U32
    minor: U32
    max_readahead: U32
    flags: U32
    max_background: U16
    congestion_threshold: U16
    max_write: U32
    time_gran: U32
    max_pages: U16
    map_alignment: U16
    flags2: U32
    max_stack_depth: U32
    request_timeout: U16P22


class InterruptIn(NamedTuple):
    unique: U64


class BmapIn(NamedTuple):
    block: U64
    blocksize: U32P4


class BmapOut(NamedTuple):
    block: U64


class IoctlIn(NamedTuple):
    fh: U64
    flags: U32
    cmd: U32
    arg: U64
    in_size: U32
    out_size: U32


class IoctlOut(NamedTuple):
    result: I32
    flags: U32
    in_iovs: U32
    out_iovs: U32


class PollIn(NamedTuple):
    fh: U64
    kh: U64
    flags: U32
    events: U32


class PollOut(NamedTuple):
    revents: U32P4


class FallocateIn(NamedTuple):
    fh: U64
    offset: U64
    length: U64
    mode: U32P4


class LseekIn(NamedTuple):
    fh: U64
    offset: I64
    whence: U32P4


class LseekOut(NamedTuple):
    offset: U64


class CopyFileRangeIn(NamedTuple):
    """Of FUSE_COPY_FILE_RANGE (answered by a WriteOut) and of FUSE_COPY_FILE_RANGE_64 (by a CopyFileRangeOut)."""

    fh_in: U64
    off_in: U64
    nodeid_out: U64
    fh_out: U64
    off_out: U64
    len: U64
    flags: U64


class CopyFileRangeOut(NamedTuple):
    bytes_copied: U64


class Dirent(NamedTuple):
    ino: U64
    off: U64
    namelen: U32
    type: U32


class Direntplus(NamedTuple):
    entry_out: EntryOut
    dirent: Dirent


class NotifyPollWakeupOut(NamedTuple):
    kh: U64


class NotifyInvalInodeOut(NamedTuple):
    ino: U64
    off: I64
    len: I64


class NotifyInvalEntryOut(NamedTuple):
    parent: U64
    namelen: U32
    flags: U32


class NotifyDeleteOut(NamedTuple):
    parent: U64
    child: U64
    namelen: U32P4


class NotifyStoreOut(NamedTuple):
    nodeid: U64
    offset: U64
    size: U32P4


class NotifyRetrieveOut(NamedTuple):
    notify_unique: U64
    nodeid: U64
    offset: U64
    size: U32P4


class NotifyPruneOut(NamedTuple):
    count: U32P12  # type: ignore[assignment]


class ExtHeader(NamedTuple):
    size: U32
    type: U32


class SecctxHeader(NamedTuple):
    size: U32
    nr_secctx: U32


class Secctx(NamedTuple):
    size: U32P4


class SuppGroups(NamedTuple):
    """Followed by nr_groups group ids of 32 bits."""

    nr_groups: U32


class BackingMap(NamedTuple):
    """The argument of FUSE_DEV_IOC_BACKING_OPEN, which returns a backing id."""

    fd: I32
    flags: U32P8
