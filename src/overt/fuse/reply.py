"""What is in flight, and the bytes that answer it.

Each request that wants an answer is in `inflight` from the moment it is decoded until one of the encoders here makes
its reply, and leaves it in one atomic step of a dict, so that encoders may be called from any thread. To answer twice
is a programming error and raises: by then the kernel may have given the unique to another request.

An encoder returns one whole reply, header included, to be written by one write(2) to /dev/fuse.
"""

from errno import EAGAIN
from struct import Struct

from overt.wire import fuse
from overt.wire.record import pack, size_of, struct_of

from .attr import Validity
from .directory import DirBuffer
from .request import Request

# One layout each, header included. Timeouts and attributes come packed (see overt.fuse.attr).
_OUT = struct_of(fuse.OutHeader)
_ENTRY = Struct("=IiQQQ24s88s")
_ATTR = Struct("=IiQ16s88s")
_OPENED = struct_of(fuse.OutHeader, fuse.OpenOut)
_CREATED = Struct("=IiQQQ24s88sQIi")
_WRITTEN = struct_of(fuse.OutHeader, fuse.WriteOut)
_COPIED = struct_of(fuse.OutHeader, fuse.CopyFileRangeOut)
_STATFS = struct_of(fuse.OutHeader, fuse.StatfsOut)
_XATTR = struct_of(fuse.OutHeader, fuse.GetxattrOut)
_LOCK = struct_of(fuse.OutHeader, fuse.LkOut)
_LSEEK = struct_of(fuse.OutHeader, fuse.LseekOut)
_BMAP = struct_of(fuse.OutHeader, fuse.BmapOut)
_IOCTL = struct_of(fuse.OutHeader, fuse.IoctlOut)
_POLL = struct_of(fuse.OutHeader, fuse.PollOut)

_NO_ATTR = bytes(size_of(fuse.Attr))


class Replies:
    """The requests in flight on one connection, by unique, and the encoders of their answers."""

    def __init__(self) -> None:
        self.inflight: dict[int, Request] = {}

    def _end(self, unique: int) -> None:
        if self.inflight.pop(unique, None) is None:
            raise RuntimeError(f"request {unique} is not in flight: it was answered before, or never wanted an answer")

    def error(self, unique: int, errno: int) -> bytes:
        """Fail the request with a positive errno."""
        self._end(unique)
        return _OUT.pack(16, -errno, unique)

    def empty(self, unique: int) -> bytes:
        """The request succeeded and there is nothing to say."""
        self._end(unique)
        return _OUT.pack(16, 0, unique)

    def entry(self, unique: int, nodeid: int, generation: int, valid: Validity, attr: bytes) -> bytes:
        """An inode, looked up once more; `attr` is a packed Attr (`attr_of`)."""
        self._end(unique)
        return _ENTRY.pack(144, 0, unique, nodeid, generation, valid.entry, attr)

    def negative(self, unique: int, valid: Validity) -> bytes:
        """There is no such name, and for `valid` nobody needs to ask again."""
        self._end(unique)
        return _ENTRY.pack(144, 0, unique, 0, 0, valid.entry, _NO_ATTR)

    def attr(self, unique: int, valid: Validity, attr: bytes) -> bytes:
        """An inode's attributes, packed (`attr_of`)."""
        self._end(unique)
        return _ATTR.pack(120, 0, unique, valid.attr, attr)

    def statx(self, unique: int, valid: Validity, stat: fuse.Statx) -> bytes:
        """An inode's attributes as statx(2) has them."""
        self._end(unique)
        body = valid.attr + bytes(16) + pack(stat)
        return _OUT.pack(16 + len(body), 0, unique) + body

    def opened(self, unique: int, fh: int, open_flags: int = 0, backing_id: int = 0) -> bytes:
        """An open file or directory; `open_flags` are FOPEN_*, `backing_id` goes with FOPEN_PASSTHROUGH."""
        self._end(unique)
        return _OPENED.pack(32, 0, unique, fh, open_flags, backing_id)

    def created(
        self,
        unique: int,
        nodeid: int,
        generation: int,
        valid: Validity,
        attr: bytes,
        fh: int,
        open_flags: int = 0,
        backing_id: int = 0,
    ) -> bytes:
        """An inode, looked up once more, and an open file of it: `entry` and `opened` in one."""
        self._end(unique)
        return _CREATED.pack(160, 0, unique, nodeid, generation, valid.entry, attr, fh, open_flags, backing_id)

    def data(self, unique: int, payload: bytes) -> bytes:
        """Bytes: a symlink's target, an xattr, data. For much of it see `data_header`."""
        self._end(unique)
        return _OUT.pack(16 + len(payload), 0, unique) + payload

    def data_header(self, unique: int, size: int) -> bytes:
        """The header of a `data` reply of `size` bytes, which the caller writes after it in the same writev(2)."""
        self._end(unique)
        return _OUT.pack(16 + size, 0, unique)

    def directory(self, unique: int, entries: DirBuffer) -> memoryview:
        """The entries of a READDIR or READDIRPLUS; none means the end of the directory."""
        self._end(unique)
        return entries.reply(unique)

    def written(self, unique: int, size: int) -> bytes:
        """`size` bytes were written, or copied by COPY_FILE_RANGE."""
        self._end(unique)
        return _WRITTEN.pack(24, 0, unique, size)

    def copied(self, unique: int, size: int) -> bytes:
        """`size` bytes were copied by COPY_FILE_RANGE_64."""
        self._end(unique)
        return _COPIED.pack(24, 0, unique, size)

    def statfs(self, unique: int, st: fuse.Kstatfs) -> bytes:
        """Space and inodes of the filesystem, in units of `st.frsize`."""
        self._end(unique)
        return _STATFS.pack(96, 0, unique, *st)

    def xattr_size(self, unique: int, size: int) -> bytes:
        """How long the xattr, or the list of them, is: the answer when the request's `size` is 0."""
        self._end(unique)
        return _XATTR.pack(24, 0, unique, size)

    def lock(self, unique: int, lock: fuse.FileLock) -> bytes:
        """The lock that stands in the way; of type F_UNLCK if none does."""
        self._end(unique)
        return _LOCK.pack(40, 0, unique, *lock)

    def lseek(self, unique: int, offset: int) -> bytes:
        """Where the hole or the data begins."""
        self._end(unique)
        return _LSEEK.pack(24, 0, unique, offset)

    def bmap(self, unique: int, block: int) -> bytes:
        """The block of the device that holds the block asked for; 0 for a hole."""
        self._end(unique)
        return _BMAP.pack(24, 0, unique, block)

    def ioctl(self, unique: int, result: int, payload: bytes = b"") -> bytes:
        """What the ioctl returns, and what it leaves in the caller's memory."""
        self._end(unique)
        return _IOCTL.pack(32 + len(payload), 0, unique, result, 0, 0, 0) + payload

    def poll(self, unique: int, revents: int) -> bytes:
        """The events that are ready."""
        self._end(unique)
        return _POLL.pack(24, 0, unique, revents)

    def requeue(self, interrupt: Request) -> bytes:
        """Make the kernel send an INTERRUPT again, because its target has not arrived yet (only with several readers).

        Writing it fails with ENOENT if the target was answered meanwhile, which is not an error.
        """
        return _OUT.pack(16, -EAGAIN, interrupt.unique)
