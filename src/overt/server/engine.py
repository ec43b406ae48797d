"""The loop: one thread at a time reads and answers the requests of all mounts.

A FUSE round trip is dominated by waking the server, so after a request the loop looks again for a moment (some tens of
microseconds) before it sleeps; that is what makes a Python server as quick as others. When nothing comes it sleeps in
epoll_wait and uses no processor time.

The thread that has the loop is its *leader*. It may be kept: by a flush that it makes itself, because handing short
work to another thread takes longer than the work; by a disk that hangs in a look-up; by a directory of a million names.
A *lookout* sleeps beside it until a timer goes off. If the leader has not got on by then, the lookout takes the loop
over, and a new lookout takes its place:

    leader      request  request  fsync ──────────────────────► answer, and it is nobody any more
    timer                         set ─────── goes off
    lookout     sleeping                      takes over: leader ─── request  request ───►
    another                                   lookout: sleeping ───►

A mount whose request keeps the old leader is left alone until that is done (a tree is used by one thread at a time);
everybody else is served. Work that is known to block (`Mount.submit`) uses no tree, and so keeps no mount.

A leader that was replaced may not know it yet. So what it is doing stands in its own `_Turn`, and it says there which
mount it takes up *before* it looks whether it still leads; the lookout ends the turn *before* it looks which mount that
is. One of the two sees the other.
"""

import contextlib
import errno
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from time import monotonic

from overt.events import Events
from overt.host.memory import give_back
from overt.host.timer import Timer
from overt.server import identity
from overt.server.data import tidy
from overt.server.mount import MAX_WRITE, Mount
from overt.server.pool import Pool
from overt.tree.layer import DescriptorCache

_LOOKS = 40
"""how often to look for the next request before sleeping, about a microsecond each"""
_QUIET = 10
"""after how many of them what can wait is done"""
_REQUESTS = 64
"""how many requests of one mount are served before the others are looked at"""
_MANY = 5_000
"""how many files the kernel has to forget before memory is given back"""
_BUFFER = MAX_WRITE + 8192
_PATIENCE = 1e-3
"""seconds that work may keep the loop of which it is known that it may block (`Pool.quick` says that it rarely does)"""
_BEAT = 0.05
"""seconds after which a leader that has not got on is replaced, or twice that"""
_CREW = 256
"""threads at most that lead, look out, or are kept"""
_AGAIN = 1.0
"""seconds between two attempts to have a lookout, where there can be no more threads"""

Call = Callable[[], None]


class _Turn:
    """The time for which one thread leads."""

    __slots__ = ("calls", "ended", "ended_at", "idle", "leader", "serving", "since", "steps", "working", "works")

    def __init__(self) -> None:
        self.leader = threading.get_native_id()
        self.serving: Mount | None = None
        """the mount whose tree it uses"""
        self.steps = 0
        self.idle = False
        self.working: Pool | None = None
        """whose work it does, which may block"""
        self.since = 0.0
        """since when, on the monotonic clock"""
        self.works = 0
        """how often it has"""
        self.ended = False
        self.ended_at = 0.0
        self.calls: list[Call] = []
        """what was posted since it ended for the mount that it keeps"""


class Engine:
    """Serves the requests of every mount that was added."""

    def __init__(self, events: Events, descriptors: int) -> None:
        """`descriptors`: how many directory descriptors to keep open at most."""
        self.events = events
        self.cache = DescriptorCache(descriptors)
        self.mounts: dict[int, Mount] = {}
        self.gone: Callable[[Mount], None] = lambda mount: None
        """called when the kernel has let go of a mount"""
        self.replaced = 0
        """how often a leader was"""
        self._epoll = select.epoll()
        self._posted: deque[tuple[Mount | None, Call]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._watched: dict[int, Call] = {}
        self._crew = Pool(_CREW, "engine")
        self._timer = Timer()
        self._watching = self._near = False
        """whether the timer is set, and whether it goes off within `_PATIENCE`: setting it costs ten microseconds"""
        self._turn = _Turn()
        self._kept: dict[Mount, _Turn] = {}
        """mounts that are in the hands of a leader that was replaced"""
        self._hands = threading.Lock()
        self._running = True
        self._rung, self.bell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        """what is written to `bell` wakes the thread in `wait`: for signal.set_wakeup_fd, because the kernel may give a
        signal to any thread, and Python handles it in the first one only"""

    @property
    def leader(self) -> int:
        """The id of the thread that leads."""
        return self._turn.leader

    def kept(self, seconds: float) -> list[tuple[Mount, int]]:
        """The mounts that a request has kept for so long, each with the id of the thread that it keeps."""
        with self._hands:
            since = monotonic() - seconds
            return [(mount, turn.leader) for mount, turn in self._kept.items() if turn.ended_at < since]

    def post(self, call: Call, mount: Mount | None = None) -> None:
        """Have `call` made by the loop, `mount` being the one whose tree it uses; any thread."""
        self._posted.append((mount, call))
        os.eventfd_write(self._wake, 1)

    def watch(self, fd: int, call: Call) -> None:
        """Have `call` made whenever `fd` is readable."""
        self._watched[fd] = call
        self._epoll.register(fd, select.EPOLLIN)

    def forget(self, fd: int) -> None:
        """Do not look at `fd` any more; for what `watch` calls."""
        self._epoll.unregister(fd)
        del self._watched[fd]

    def add(self, mount: Mount) -> None:
        """Serve a mount from now on; any thread."""
        self.mounts[mount.fd] = mount
        self._epoll.register(mount.fd, select.EPOLLIN)

    def stop(self) -> None:
        """Make `wait` return; any thread."""

        def halt() -> None:
            self._running = False
            os.write(self.bell, b"0")

        self.post(halt)

    def start(self) -> None:
        """Begin to serve, on a thread of its own; OSError (EAGAIN) if there can be none."""
        self._crew.submit(self._lead)

    def wait(self) -> None:
        """Return after `stop`. The calling thread only waits, and so is free for signals."""
        while self._running:
            select.select([self._rung], [], [])
            os.read(self._rung, 64)

    # Who leads

    def _lead(self) -> None:
        """Serve until this turn ends; whatever goes wrong, somebody has to lead."""
        self._turn = turn = _Turn()
        # There is one thread at least, this one, so that this does not fail: at worst nobody looks out for a while.
        self._crew.submit(self._look_out)
        if self._crew.short:
            self.events.say("nobody looks out for the engine's leader", why="no more threads")
        while self._running and not turn.ended:
            try:
                self._serve_all(turn)
            except Exception:
                self.events.crash("the engine's loop")
                time.sleep(_BEAT)

    def _serve_all(self, turn: _Turn) -> None:
        identity.own_umask()
        buffer = bytearray(_BUFFER)
        tried = monotonic()
        self._make_calls(turn)  # the one before may have heard of them, and no more
        while self._running and not turn.ended:
            turn.idle = True
            ready = self._epoll.poll()
            turn.idle = False
            if self._crew.short and monotonic() - tried > _AGAIN:
                self._crew.replenish()
                tried = monotonic()
            if not self._watching:
                self._watch(near=False)
            for fd, _ in ready:
                mount = self.mounts.get(fd)
                if mount is not None:
                    self._take_up(turn, mount, buffer, alone=len(ready) == 1)
                elif fd == self._wake:
                    with contextlib.suppress(BlockingIOError):  # one who was replaced has read it
                        os.eventfd_read(self._wake)
                    self._make_calls(turn)
                else:
                    self._call(self._watched[fd])
                if turn.ended:
                    return

    def _look_out(self) -> None:
        """Sleep until the leader is overdue, and take its place."""
        seen, works, beat = (self._turn, -1), 0, False
        while self._running:
            self._timer.wait()
            self._watching = self._near = False  # before looking what the leader does: it looks the other way round
            turn = self._turn
            if turn.working is not None:
                overdue = monotonic() - turn.since >= _PATIENCE
            else:
                overdue = beat and not turn.idle and seen == (turn, turn.steps)
            if overdue:
                try:
                    self._replace(turn)
                except Exception:  # whatever it is, somebody has to lead
                    self.events.crash("replacing the engine's leader")
                self._lead()
                return
            near = turn.working is not None or turn.works != works
            beat, works, seen = not near, turn.works, (turn, turn.steps)
            if near or not turn.idle:
                self._watch(near=near)

    def _watch(self, *, near: bool) -> None:
        self._watching, self._near = True, near
        self._timer.arm(_PATIENCE if near else _BEAT)

    def _replace(self, turn: _Turn) -> None:
        with self._hands:
            turn.ended = True
            turn.ended_at = monotonic()
            self.replaced += 1
            mount, pool = turn.serving, turn.working
            if mount is not None and mount not in self._kept and self.mounts.get(mount.fd) is mount:
                self._kept[mount] = turn
                self._epoll.unregister(mount.fd)
            if pool is not None:
                pool.quick = False

    def _let_go(self, turn: _Turn, mount: Mount) -> None:
        """The turn is done with a mount: if it has kept it, others may have it now."""
        turn.serving = None
        if not turn.ended:
            return
        with self._hands:
            if self._kept.get(mount) is not turn:
                return
            del self._kept[mount]
            self._epoll.register(mount.fd, select.EPOLLIN)
        for call in turn.calls:
            self.post(call, mount)

    # What the leader does

    def _take_up(self, turn: _Turn, mount: Mount, buffer: bytearray, *, alone: bool) -> None:
        turn.serving = mount
        try:
            while not turn.ended and self._serve(turn, mount, buffer, alone=alone):
                self._block(turn, mount)
                alone = False  # sleep soon: whoever waits for this answer may have been put on this very processor
        except Exception:
            self.events.crash(f"serving {mount.target}, which is given up")
            self._lose(turn, mount)
        finally:
            self._let_go(turn, mount)

    def _serve(self, turn: _Turn, mount: Mount, buffer: bytearray, *, alone: bool) -> bool:
        """Serve a mount for a while; True if it left at work that may block, and there may be more to serve."""
        fd = mount.fd
        into = [buffer]
        readv, handle = os.readv, mount.handle
        inflight = mount.session.inflight  # not empty: workers are busy, and need the processor more than we do
        looks = served = 0
        while True:
            try:
                size = readv(fd, into)
            except BlockingIOError:
                looks += 1
                leaving = looks > _LOOKS or not alone or inflight or self._posted
                if leaving or looks == _QUIET:
                    tidy(mount)
                    self._trim(turn)
                    if mount.tree.forgotten > _MANY:
                        self._give_back(mount)
                if leaving:
                    return False
                continue
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted, or aborted
                    self._lose(turn, mount)
                    return False
                if error.errno in (errno.ENOENT, errno.EINTR):  # the request was withdrawn before it was read
                    continue
                raise
            handle(buffer, size)
            looks = 0
            served += 1
            turn.steps += 1
            if turn.ended:
                _hand_over(mount)
                return False
            if mount.due is not None:
                return True
            if served == _REQUESTS or self._posted:
                self._trim(turn)
                return False  # others have their turn; what is left to read makes epoll come back

    def _block(self, turn: _Turn, mount: Mount) -> None:
        """Do the work that is due here and now; if it takes long, the loop goes on without this thread."""
        assert mount.due is not None
        (call, arguments), mount.due = mount.due, None
        self._let_go(turn, mount)
        identity.become_root()
        turn.since = monotonic()
        turn.works += 1
        turn.working = mount.pool
        if not self._near:
            self._watch(near=True)
        mount.pool.work(call, *arguments)
        turn.working = None
        turn.steps += 1
        if not turn.ended:
            turn.serving = mount

    def _make_calls(self, turn: _Turn) -> None:
        """Make the calls that are there now; what they post, which has rung, is for when others have had their turn."""
        for _ in range(len(self._posted)):
            if turn.ended:
                return
            try:
                mount, call = self._posted.popleft()
            except IndexError:
                return
            if mount is None:
                turn.steps += 1
                self._call(call)
                continue
            turn.steps += 1
            turn.serving = mount
            with self._hands:
                keeper = self._kept.get(mount)
                if keeper is not None and keeper is not turn:
                    keeper.calls.append(call)
                    turn.serving = None
                    continue
                if turn.ended and keeper is None:
                    self.post(call, mount)
                    return
            self._call(call)
            _hand_over(mount)
            self._let_go(turn, mount)

    def _call(self, call: Call) -> None:
        """Nothing that is done for one mount or one client may end the loop for all."""
        try:
            call()
        except Exception:
            self.events.crash("the engine's loop")

    def _trim(self, turn: _Turn) -> None:
        if self.cache.full:
            with self._hands:  # nobody is replaced in the midst of it
                if not turn.ended and not self._kept:  # whoever is kept may hold a number that it was given
                    self.cache.trim()

    def _give_back(self, mount: Mount) -> None:
        """The kernel has forgotten many files: so does our memory, as soon as most are gone.

        That takes a look at each object that is left, so it is done once for at least as many that went.
        """
        if mount.tree.forgotten >= sum(len(other.tree.nodes) for other in list(self.mounts.values())):
            mount.tree.shrink()
            with contextlib.suppress(RuntimeError):  # no more threads: another time
                threading.Thread(target=give_back, daemon=True).start()

    def _lose(self, turn: _Turn, mount: Mount) -> None:
        with self._hands:
            if turn.ended:  # the one who leads now will find the same
                return
            del self.mounts[mount.fd]
            self._epoll.unregister(mount.fd)
        mount.gone = True
        # On a thread of its own: it waits for the workers, and must not keep one of them from its work.
        try:
            threading.Thread(target=self._bury, args=(mount,), daemon=True).start()
        except RuntimeError as error:  # no more threads
            self.events.say("a mount is closed by the thread that serves", mount=mount.target, why=str(error))
            self._bury(mount)

    def _bury(self, mount: Mount) -> None:
        """Close what a mount held, once its workers have ended."""
        try:
            mount.close()
        except OSError as error:
            self.events.say("close failed", mount=mount.target, why=str(error))
        self.gone(mount)


def _hand_over(mount: Mount) -> None:
    """Have a worker do what is due."""
    if mount.due is not None:
        (call, arguments), mount.due = mount.due, None
        mount.pool.see_to(call, *arguments)
