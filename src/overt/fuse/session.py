"""One FUSE connection, without I/O: bytes read from /dev/fuse become requests, and answers become bytes to write.

The kernel is trusted with nothing. Every request is checked to the byte before anybody acts on it, and one that is not
as the protocol says is refused: a line in the log, an error to the caller, never a traceback. What must not happen is a
wrong answer: a reply names its request by `unique` alone, so one that repeats the unique of a request in flight, or
whose unique is 0 (a reply with 0 is a notification), or that never wants an answer (FORGET, INTERRUPT) is refused in
silence.

INTERRUPT names a request that somebody has stopped waiting for. With one reader its target has always been read
before: the kernel queues an interrupt only once the request was handed out. A target in flight gets `interrupted` set,
and whoever has parked it may answer EINTR at once; an unknown one was answered meanwhile, and nothing needs to be done.
With several readers (FUSE_DEV_IOC_CLONE) it may also not have arrived yet, and then `requeue` makes the kernel send the
interrupt again (Documentation/filesystems/fuse, "Interrupting filesystem operations").

Threads: one of them decodes; encoders may be called from any (see `overt.fuse.reply`).
"""

from collections.abc import Callable
from errno import EIO, ENOSYS, EPROTO
from functools import lru_cache
from mmap import PAGESIZE
from typing import Any, NamedTuple, NoReturn

from overt.wire import fuse
from overt.wire.record import size_of, struct_of

from .opcodes import MAX_WRITE, NAMES, OPCODES, STEP, TEXT, UNANSWERED, Opcode
from .reply import Replies
from .request import Refused, Request

MINOR_OLDEST, MINOR_NEWEST = 31, 46
# How many pages one request can carry, without and with FUSE_MAX_PAGES.
_PAGES_PLAIN, _PAGES_MOST = 32, 65535
_WRITE_LEAST = 4096

_INIT = struct_of(fuse.OutHeader, fuse.InitOut)

_header = struct_of(fuse.InHeader).unpack_from
_HEADER_SIZE = size_of(fuse.InHeader)
_init = struct_of(fuse.InitIn).unpack_from
_init_compat = struct_of(fuse.InitInCompat).unpack_from
_forgets = struct_of(fuse.ForgetOne).iter_unpack


_NO_NAMES = frozenset((b"",))
_NO_STEPS = frozenset((b"", b".", b".."))


class _Shape(NamedTuple):
    """A row of the opcode table, ready for `decode`."""

    unpack: Callable[[bytearray, int], tuple[Any, ...]]
    body: int  # where the record ends
    names: tuple[tuple[frozenset[bytes], bool], ...]  # what a name may not be, and whether "/" may not be in it
    payload: tuple[int, int, int, int] | None  # index into the record, unit, least, most
    answered: bool


def _shape(row: Opcode, record: type[tuple[Any, ...]] | None, max_write: int, dots: bool) -> _Shape:
    layout = struct_of(record) if record else struct_of()
    may_be_dots = (TEXT, STEP) if dots else (TEXT,)
    names = tuple((_NO_NAMES if kind in may_be_dots else _NO_STEPS, kind != TEXT) for kind in row.names)
    payload = None
    if row.payload and record:
        fields: tuple[str, ...] = record._fields  # type: ignore[attr-defined]
        most = max_write if row.payload.most == MAX_WRITE else row.payload.most
        payload = fields.index(row.payload.field), row.payload.unit, row.payload.least, most
    return _Shape(layout.unpack_from, _HEADER_SIZE + layout.size, names, payload, row.number not in UNANSWERED)


@lru_cache(maxsize=8)
def _shapes(minor: int, max_write: int, extended: bool, dots: bool) -> dict[int, _Shape]:
    """What was negotiated, by opcode; the same for all mounts that negotiated the same. Nobody changes it.

    `extended`: FUSE_SETXATTR_EXT; `dots`: FUSE_EXPORT_SUPPORT.
    """
    shapes = {}
    for row in OPCODES:
        if row.since > minor or row.number == fuse.FUSE_INIT:
            continue
        record = row.record
        if record is fuse.SetxattrIn and not extended:
            record = fuse.SetxattrInCompat
        shapes[row.number] = _shape(row, record, max_write, dots)
    return shapes


class Session(Replies):
    """The state of one connection.

    `wanted` are the FUSE_* flags of INIT that the filesystem would like; what the kernel grants is in `flags` once
    `ready`. `max_write` is in bytes, at least 4096; `log` gets one line for each request refused. `max_background` and
    `congestion_threshold` count requests, `request_timeout` is in seconds (0: none). `max_stack_depth` is how many
    filesystems may be stacked below a file in passthrough, plus one.
    """

    def __init__(
        self,
        wanted: int,
        max_write: int,
        log: Callable[[str], None],
        *,
        max_background: int = 64,
        congestion_threshold: int = 48,
        max_stack_depth: int = 1,
        request_timeout: int = 0,
        page_size: int = PAGESIZE,
    ) -> None:
        super().__init__()
        if max_write < _WRITE_LEAST:
            raise ValueError(f"max_write is {max_write}, and the kernel sends writes of {_WRITE_LEAST} bytes anyway")
        self.ready = False
        self.minor = 0
        self.flags = 0
        self.max_write = max_write
        self.max_readahead = 0
        self.max_pages = 0
        self.max_background = max_background
        self.congestion_threshold = congestion_threshold
        self.max_stack_depth = max_stack_depth
        self.request_timeout = request_timeout
        self.time_gran = 1
        self._wanted = wanted | fuse.FUSE_INIT_EXT | fuse.FUSE_MAX_PAGES | fuse.FUSE_BIG_WRITES
        self._page_size = page_size
        self._log = log
        self._shapes: dict[int, _Shape] = {}

    @property
    def buffer_size(self) -> int:
        """How long the reader's buffer has to be, in bytes; with a shorter one read(2) of /dev/fuse fails (EINVAL)."""
        return max(fuse.FUSE_MIN_READ_BUFFER, _HEADER_SIZE + size_of(fuse.WriteIn) + self.max_write)

    # Requests

    def decode(self, buf: bytearray, size: int) -> Request:
        """Return the request in the first `size` bytes of `buf` (which is at least that long): one read(2).

        FORGET, BATCH_FORGET and INTERRUPT are returned too but want no answer. Raises Refused, and nothing else,
        whatever the bytes are.
        """
        if size < _HEADER_SIZE:
            self._refuse(0, 0, EIO, f"{size} bytes are no request")
        length, opcode, unique, nodeid, uid, gid, pid, extensions = _header(buf, 0)
        shape = self._shapes.get(opcode)
        if shape is None or length != size or not unique or unique in self.inflight:
            return self._unexpected(buf, size, length, opcode, unique)
        unpack, position, names, sized, answered = shape
        end = size - 8 * extensions if extensions else size
        if position > end:
            self._refuse(opcode, unique, EIO, f"{size} bytes with {extensions * 8} of extensions are too few")

        request = Request()
        request.unique = unique
        request.opcode = opcode
        request.nodeid = nodeid
        request.uid = uid
        request.gid = gid
        request.pid = pid
        request.arg = arg = unpack(buf, _HEADER_SIZE)
        request.interrupted = False
        request.name = request.name2 = request.payload = b""

        rest: bytes | memoryview = b""
        if names:
            found = bytes(buf[position:end]).split(b"\0", len(names))
            rest = found.pop()
            if len(found) < len(names):
                self._refuse(opcode, unique, EIO, "a name without its end")
            request.name = name = found[0]
            forbidden, one_step = names[0]
            if name in forbidden or (one_step and b"/" in name):
                self._refuse(opcode, unique, EIO, f"{name!r} is no name")
            if len(found) == 2:
                request.name2 = name = found[1]
                forbidden, one_step = names[1]
                if name in forbidden or (one_step and b"/" in name):
                    self._refuse(opcode, unique, EIO, f"{name!r} is no name")
        elif position != end:
            rest = memoryview(buf)[position:end]
        if sized:
            field, unit, least, most = sized
            count = arg[field]
            if not least <= count <= most or count * unit != len(rest):
                self._refuse(opcode, unique, EIO, f"a payload of {count} in {len(rest)} bytes, limits {least}, {most}")
            request.payload = rest
        elif rest:
            self._refuse(opcode, unique, EIO, f"{len(rest)} bytes too many")

        if answered:
            self.inflight[unique] = request
        elif opcode == fuse.FUSE_INTERRUPT:
            target = self.inflight.get(arg[0])
            if target is not None:
                target.interrupted = True
        elif opcode == fuse.FUSE_FORGET:
            request.arg = ((nodeid, arg[0]),)
        else:
            request.arg = tuple(_forgets(request.payload))
            request.payload = b""
        return request

    def _unexpected(self, buf: bytearray, size: int, length: int, opcode: int, unique: int) -> Request:
        """Of a request that does not fit the state of the connection: INIT, or why it is refused."""
        if length != size:
            self._refuse(opcode, unique, EIO, f"it says {length} bytes, {size} were read")
        if not unique:
            self._refuse(opcode, unique, EPROTO, "unique is 0")
        if unique in self.inflight:
            self._refuse(opcode, unique, EPROTO, f"unique {unique} is in flight")
        if opcode == fuse.FUSE_INIT and not self.ready:
            return self._decode_init(buf, size, unique)
        if opcode == fuse.FUSE_INIT:
            self._refuse(opcode, unique, EPROTO, "INIT was answered before")
        if not self.ready:
            self._refuse(opcode, unique, EPROTO, "INIT has to come first")
        self._refuse(opcode, unique, ENOSYS, "unknown opcode")

    def _decode_init(self, buf: bytearray, size: int, unique: int) -> Request:
        if size < _HEADER_SIZE + size_of(fuse.InitInCompat):
            self._refuse(fuse.FUSE_INIT, unique, EIO, f"{size} bytes are too few")
        whole = size >= _HEADER_SIZE + size_of(fuse.InitIn)
        request = Request()
        request.unique = unique
        request.opcode = fuse.FUSE_INIT
        request.nodeid = request.uid = request.gid = request.pid = 0
        request.arg = _init(buf, _HEADER_SIZE) if whole else (*_init_compat(buf, _HEADER_SIZE), 0)
        request.interrupted = False
        request.name = request.name2 = request.payload = b""
        self.inflight[unique] = request
        return request

    def _refuse(self, opcode: int, unique: int, errno: int, why: str) -> NoReturn:
        why = f"fuse: refused {NAMES.get(opcode, f'opcode {opcode}')}, unique {unique}: {why}"
        self._log(why)
        silent = opcode in UNANSWERED or unique in self.inflight
        raise Refused(0 if silent else unique, errno, why) from None

    # Negotiation

    def init(self, request: Request) -> bytes:
        """Negotiate, and return the reply to INIT. Raises Refused (EPROTO) if the kernel is too old.

        A kernel with a newer major version is told ours, and sends another INIT; until then the session is not `ready`.
        """
        major, minor, max_readahead, offered, offered2 = request.arg
        if (major, minor) < (fuse.FUSE_KERNEL_VERSION, MINOR_OLDEST):
            del self.inflight[request.unique]
            self._refuse(
                request.opcode,
                request.unique,
                EPROTO,
                f"the kernel speaks FUSE {major}.{minor}, at least {fuse.FUSE_KERNEL_VERSION}.{MINOR_OLDEST} is needed",
            )
        self._end(request.unique)
        if major > fuse.FUSE_KERNEL_VERSION:
            ours = fuse.InitOut(fuse.FUSE_KERNEL_VERSION, MINOR_NEWEST, *[0] * 11)
            return _INIT.pack(_INIT.size, 0, request.unique, *ours)

        if offered & fuse.FUSE_INIT_EXT:
            offered |= offered2 << 32
        flags = self._wanted & offered
        if flags & fuse.FUSE_PASSTHROUGH:
            # the kernel would drop passthrough, silently, if it were given both
            flags &= ~fuse.FUSE_WRITEBACK_CACHE
        else:
            self.max_stack_depth = 0
        if not flags & fuse.FUSE_REQUEST_TIMEOUT:
            self.request_timeout = 0
        pages = _PAGES_MOST if flags & fuse.FUSE_MAX_PAGES else _PAGES_PLAIN
        self.max_write = min(self.max_write, pages * self._page_size)
        self.max_pages = -(-self.max_write // self._page_size)
        self.max_readahead = max_readahead
        self.minor = min(minor, MINOR_NEWEST)
        self.flags = flags
        self.ready = True
        extended = bool(flags & fuse.FUSE_SETXATTR_EXT)
        self._shapes = _shapes(self.minor, self.max_write, extended, bool(flags & fuse.FUSE_EXPORT_SUPPORT))
        return _INIT.pack(
            _INIT.size,
            0,
            request.unique,
            *fuse.InitOut(
                major=fuse.FUSE_KERNEL_VERSION,
                minor=self.minor,
                max_readahead=max_readahead,
                flags=flags & 0xFFFFFFFF,
                max_background=self.max_background,
                congestion_threshold=self.congestion_threshold,
                max_write=self.max_write,
                time_gran=self.time_gran,
                max_pages=self.max_pages,
                map_alignment=0,
                flags2=flags >> 32,
                max_stack_depth=self.max_stack_depth,
                request_timeout=self.request_timeout,
            ),
        )
