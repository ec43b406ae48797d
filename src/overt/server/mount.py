"""One mount: a connection to the kernel, a tree, and a share in an upper's errors."""

import errno
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from overt.events import Events
from overt.fuse import notify
from overt.fuse.attr import attr_of, validity
from overt.fuse.request import Refused, Request
from overt.fuse.session import Session
from overt.ledger import Account
from overt.overlay.options import Options
from overt.overlay.view import ACLS
from overt.server import identity
from overt.server.caller import is_dying
from overt.server.pool import Pool, Work
from overt.tree.data import blocks_of_data
from overt.tree.node import Node
from overt.tree.tree import Later, Tree
from overt.upper import Upper
from overt.wire import fuse

WANTED = (
    fuse.FUSE_ASYNC_READ | fuse.FUSE_ATOMIC_O_TRUNC | fuse.FUSE_EXPORT_SUPPORT | fuse.FUSE_DONT_MASK
    | fuse.FUSE_DO_READDIRPLUS | fuse.FUSE_READDIRPLUS_AUTO | fuse.FUSE_ASYNC_DIO | fuse.FUSE_PARALLEL_DIROPS
    | fuse.FUSE_POSIX_ACL | fuse.FUSE_CACHE_SYMLINKS | fuse.FUSE_EXPLICIT_INVAL_DATA | fuse.FUSE_HANDLE_KILLPRIV_V2
    | fuse.FUSE_SETXATTR_EXT | fuse.FUSE_HAS_SYNCFS
)  # fmt: skip
MAX_WRITE = 1 << 20

# Only this process changes the layers, and it tells the kernel of what the kernel cannot see itself.
_DECADES = 10**9 * 10**9
FOREVER = validity(_DECADES, _DECADES)
UNTIL_ASKED = validity(_DECADES, 0)

Handler = Callable[["Mount", Request], bytes | memoryview | None]


class Handle:
    """One open file or directory stream: what FUSE calls an fh."""

    __slots__ = ("appends", "backing", "direct", "end", "fd", "fh", "flags", "maps", "node", "writes")

    def __init__(self, fh: int, node: Node, fd: int, flags: int, *, writes: bool) -> None:
        self.fh = fh
        self.node = node
        self.fd = fd
        self.flags = flags
        self.writes = writes
        self.backing: Any = None
        self.direct = False
        self.appends = False
        """whether it was opened to append to an append-only file, and may do no more"""
        self.end = -1
        """of a directory stream: the cookie at which it ends, whatever is added meanwhile; -1 before it has begun"""
        self.maps = False
        """whether what it writes can change the file's attributes without the kernel knowing: it can be mapped, or the
        file has got another number since"""


class Reopening:
    """A superblock that became read-only and is made writable for a moment (server/reopening.py)."""

    def __init__(self) -> None:
        self.thread = 0
        """the one that does it, while it does"""
        self.directory = -1
        """the way there, with which `thread` is set; it is closed when this is over"""
        self.late = False
        """whether nobody waits for it any more, so that it must not begin"""
        self.closing = False
        """whether it is being made read-only again"""
        self.overtaken = threading.Event()
        """somebody else has made it writable"""
        self.guard = -1
        """a file that keeps it writable then, until the thread has noticed"""
        self.again = False
        """whether one more error has to be carried over"""
        self.over = False


class Loop(Protocol):
    """What a mount needs of the engine that serves it."""

    def post(self, call: Callable[[], None], mount: "Mount") -> None:
        """Have `call`, which uses the tree of `mount`, made by the thread that handles requests."""


def _nobody(mount: "Mount", request: Request) -> bytes:
    return mount.session.error(request.unique, errno.ESTALE)


class Mount:
    """A live overlay. All methods but those that say otherwise are for the thread that handles requests."""

    def __init__(
        self, fd: int, target: str, options: Options, tree: Tree, upper: Upper | None, account: Account | None, loop:
        Loop, pool: Pool, events: Events,
    ) -> None:  # fmt: skip
        self.fd = fd
        self.target = target
        self.options = options
        self.tree = tree
        self._changed = tree.changed
        self.upper = upper
        self.account = account
        self.loop = loop
        self.pool = pool
        self.events = events
        self.volatile = options.volatile
        self.since = time.time()
        self.placed = False
        """whether it is at `target` in the server's own namespace; otherwise `target` is just what to call it"""
        self.device = 0
        self.registered = ""
        """its file in the registry, if it is at `target`"""
        self.kind = ""
        wanted = WANTED | (fuse.FUSE_PASSTHROUGH if options.passthrough else 0)
        if not options.view.acl:
            wanted &= ~fuse.FUSE_POSIX_ACL
        timeout = None if options.view.timeout is None else int(options.view.timeout * 10**9)
        self.forever = FOREVER if timeout is None else validity(timeout, timeout)
        """how long the kernel may keep names and attributes"""
        self.unlisted: frozenset[bytes] = frozenset() if options.view.acl else frozenset(ACLS)
        """xattrs that are not shown"""
        self.session = Session(wanted, MAX_WRITE, lambda line: events.say("refused", mount=target, why=line))
        self.passthrough = False
        self.handles: dict[int, Handle] = {}
        self.released: list[Handle] = []
        """files that nobody has open any more and that are still to be closed"""
        self.lost: dict[str, None] = {}
        """files that somebody was told of by fsync"""
        self.hidden = 0
        """the number of the file by which the superblock's cursor is set (server/poison.py)"""
        self.poison = 0
        """the errno to put there"""
        self.openers: set[int] = set()
        """the threads that may open it"""
        self.settling = threading.Lock()
        self.settler: threading.Thread | None = None
        """the thread that last went to do it; `settling` serialises"""
        self.tells_syncfs = False
        """whether the kernel lets syncfs(2) reach us"""
        self.probing = False
        """while that is being found out"""
        self.held: list[int] = []
        """further descriptors that live as long as the mount"""
        self.handlers: list[Handler] = []
        self.served: list[Handler] = []
        """what `handlers` are but while changes are refused (server/reopening.py)"""
        self.refuses = False
        """whether its superblock was read-only, or about to be, when its cursor was to be set"""
        self.reopening: Reopening | None = None
        self.serve_hidden: Handler = _nobody
        self.refused = ""
        """why nothing came of the negotiation with the kernel"""
        self.given_up = False
        """whether its connection was aborted because a request did not get on"""
        self.without = ""
        """what was asked for and cannot be had, in a line"""
        self.gone = False
        """whether the kernel is done with it"""
        self.due: Work | None = None
        """work that may block, to be done by whoever handles a request when that is done"""
        self._next_fh = 1
        self._waiting: dict[object, list[Request]] = {}
        self._busy = 0
        self._closing = self._closed = False
        self.destroyed = False
        """whether the kernel has said that it is done with this mount"""
        self.farewell = 0
        """the request with which it said so, while that is to be answered"""
        self.hurried = False
        """whether nobody who unmounts it is to be kept any more"""
        self.leaving = threading.Lock()
        """held by the one thread of this server that unmounts it"""
        self.ending = threading.Lock()
        """held while `record` is being made"""
        self.record: dict[str, Any] | None = None
        """the verdict on its data, once that is made (server/ending.py)"""
        self.last_flush: Callable[[Mount], object] = lambda mount: None
        """called when the kernel is done with it, before it lets go of anything"""
        self.written_back = False
        """whether the kernel has written mapped pages to us since a flush was last asked for"""
        self._idle = threading.Condition(threading.Lock())

    # Requests

    def negotiate(self, seconds: float) -> None:
        """Answer the kernel's first words, INIT; before any other thread handles requests of this mount.

        OSError if it does not say them within `seconds`, or has too old a protocol.
        """
        buffer = bytearray(fuse.FUSE_MIN_READ_BUFFER)
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        while not self.session.ready:
            if not poll.poll(seconds * 1000):
                raise OSError(errno.ETIMEDOUT, "the kernel did not begin to talk")
            self.handle(buffer, os.readv(self.fd, [buffer]))
            if self.refused:
                raise OSError(errno.EPROTO, self.refused)

    def handle(self, buffer: bytearray, size: int) -> None:
        """Serve one request that was read into `buffer`."""
        try:
            request = self.session.decode(buffer, size)
        except Refused as refusal:
            if refusal.reply:
                self.send(refusal.reply)
            return
        self.take(request)

    def dispatch(self, request: Request) -> None:
        """Call the handler of a request, and send what it returns."""
        try:
            reply = self.handlers[request.opcode](self, request)
        except OSError as error:
            if request.nodeid == self.hidden:  # no node and no open file of the tree, so every handler ends up here
                reply = self.serve_hidden(self, request)
            else:
                reply = self.session.error(request.unique, error.errno or errno.EIO)
        except Later as later:
            self._wait(request, later)
            return
        except Exception:
            self.events.crash(f"{request!r} on {self.target}")
            if request.unique not in self.session.inflight:
                return
            reply = self.session.error(request.unique, errno.EIO)
        if self._changed:  # before the reply: who gets it may look at once
            for number in set(self._changed):
                self.send(notify.inval_inode(number, -1, 0))
            self._changed.clear()
        if reply is not None:
            try:
                os.write(self.fd, reply)
            except OSError as error:
                self._unsent(error)

    take = dispatch
    """the same for a request that has just come, and is as the kernel says it (a viewed mount translates it here)"""

    def send(self, message: bytes | memoryview, data: memoryview | None = None) -> None:
        """Write a reply or a notification; any thread."""
        try:
            if data is None:
                os.write(self.fd, message)
            else:
                os.writev(self.fd, (message, data))
        except OSError as error:
            self._unsent(error)

    def _unsent(self, error: OSError) -> None:
        # ENOENT: whoever asked was killed meanwhile, or the kernel has nothing to forget. ENODEV: unmounted.
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            self.events.say("reply refused by the kernel", mount=self.target, why=str(error))

    # Work that takes long

    def begin(self) -> bool:
        """Work begins that uses this mount: it is not closed until `end`. False if it is closed already; any thread."""
        with self._idle:
            if self._closed:
                return False
            self._busy += 1
            return True

    def end(self) -> None:
        """The other half of `begin`; any thread."""
        with self._idle:
            self._busy -= 1
            if self._closing:
                self._idle.notify_all()

    def submit(self, request: Request, work: Callable[[], bytes | memoryview]) -> None:
        """Have the reply to a request made by work that may block, and uses no tree; OSError becomes its errno."""
        self.begin()
        self._have_done(self._answer, request, work)

    def _have_done(self, call: Callable[..., None], *arguments: Any) -> None:
        """By this thread, when it is done with the request, where work of late was quick; by a worker otherwise."""
        if self.pool.quick and self.due is None:
            self.due = call, arguments
        else:
            self.pool.see_to(call, *arguments)

    def _answer(self, request: Request, work: Callable[[], bytes | memoryview]) -> None:
        try:
            reply = work()
        except OSError as error:
            reply = self.session.error(request.unique, error.errno or errno.EIO)
        except Exception:
            self.events.crash(f"{request!r} on {self.target}")
            reply = self.session.error(request.unique, errno.EIO)
        self.send(reply)
        self.end()

    def _wait(self, request: Request, later: Later) -> None:
        request.keep()
        waiting = self._waiting.get(later.key)
        if waiting is not None:
            waiting.append(request)
            later.abandon()
            return
        self._waiting[later.key] = [request]

        def work() -> None:
            result: object
            try:
                result = later.work()
            except OSError as error:
                result = error
            except Exception as error:
                self.events.crash(f"copy-up on {self.target}")
                result = OSError(errno.EIO, str(error))
            self.loop.post(lambda: self._resume(later, result), self)

        self.begin()
        self._have_done(work)

    def _resume(self, later: Later, result: object) -> None:
        try:
            if self.gone:  # nobody waits any more
                if isinstance(result, int):
                    os.close(result)
            else:
                self._go_on(later, result)
        finally:
            self.end()

    def _go_on(self, later: Later, result: object) -> None:
        waiting = self._waiting.pop(later.key)
        if isinstance(result, OSError):
            for request in waiting:
                self.send(self.session.error(request.unique, result.errno or errno.EIO))
            return
        later.finish(result)
        for request in waiting:
            self.dispatch(request)
        unused = self.tree.prepared.pop(later.key, None)  # type: ignore[call-overload]
        if isinstance(unused, int):
            os.close(unused)

    def interrupt(self, unique: int) -> None:
        """Somebody has a signal: if it is the end of him, a request that still stands in line is failed.

        Any other signal can wait, as it does for overlayfs: a timer must not make an open fail.
        """
        for waiting in self._waiting.values():
            for request in waiting:
                if request.unique == unique and is_dying(request.pid):
                    waiting.remove(request)
                    self.send(self.session.error(unique, errno.EINTR))
                    return

    # What handlers share

    def attr(self, node: Node, st: os.stat_result) -> bytes:
        """A node's packed attributes; merged directories have one link, as in overlayfs."""
        node.written = st.st_mtime_ns
        if node.dropped:
            return attr_of(st, node.ino, 0)
        links = None if node.index is None else st.st_nlink + node.index.beside
        if node.data is not None:
            return attr_of(st, node.ino, links, blocks=blocks_of_data(self.tree, node, st.st_size, st.st_blksize))
        return attr_of(st, node.ino, 1 if len(node.layers) > 1 else links)

    def entry(self, request: Request, node: Node, st: os.stat_result) -> bytes:
        """The reply that names a node, which the kernel then counts as looked up."""
        node.lookups += 1
        return self.session.entry(
            request.unique, node.id, 0, UNTIL_ASKED if node.mappers else self.forever, self.attr(node, st)
        )

    def statx(self, node: Node, st: fuse.Statx) -> fuse.Statx:
        """What statx(2) is to show of a file that is `st`."""
        return st

    def become(self, request: Request, umask: int) -> None:
        """Make files as the caller from here on."""
        identity.become(request.uid, request.gid, umask)

    def xattr(self, name: bytes, value: bytes) -> bytes:
        """What an xattr is to show."""
        return value

    def new_handle(self, node: Node, fd: int, flags: int, *, writes: bool = False) -> Handle:
        """Enter an open file."""
        handle = Handle(self._next_fh, node, fd, flags, writes=writes)
        self.handles[self._next_fh] = handle
        self._next_fh += 1
        return handle

    def open_handle(self, fh: int) -> Handle:
        """The open file of this fh; EBADF if there is none."""
        handle = self.handles.get(fh)
        if handle is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return handle

    def part(self) -> None:
        """Answer the kernel's goodbye, if it has said one and waits: whoever unmounts goes on. Any thread."""
        with self._idle:
            unique, self.farewell = self.farewell, 0
        if unique:
            self.send(self.session.empty(unique))

    def hurry(self) -> None:
        """Keep nobody who unmounts it, from now on; any thread."""
        self.hurried = True
        self.part()

    def close(self) -> None:
        """The kernel is done with this mount: let go of everything, once the workers have. A worker's own thread."""
        with self._idle:
            self._closing = True
            self._idle.wait_for(lambda: not self._busy)
            self._closed = True
        self.last_flush(self)
        for handle in [*self.handles.values(), *self.released]:
            if handle.fd >= 0:
                try:
                    os.close(handle.fd)
                except OSError as error:  # of a layer that says so at last; the descriptor is gone all the same
                    self.events.say("close failed", mount=self.target, why=str(error))
        self.handles.clear()
        os.close(self.fd)
        self.tree.close()
        for fd in self.held:
            os.close(fd)
        if self.upper is not None and self.account is not None:
            self.upper.detach(self.account)
