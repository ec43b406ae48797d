"""The loop: one thread reads and answers the requests of all mounts.

A FUSE round trip is dominated by waking the server, so after a request the loop looks again for a moment (some tens of
microseconds) before it sleeps; that is what makes a Python server as quick as others. When nothing comes it sleeps in
epoll_wait and uses no processor time. Nothing that blocks for long is done here: flushes, fsync and copies are
the workers', one pool for each upper so that a stuck disk holds up only its own mounts.
"""

import errno
import os
import select
import threading
from collections import deque
from collections.abc import Callable

from overt.server.data import tidy
from overt.server.events import Events
from overt.server.handlers import TABLE
from overt.server.mount import MAX_WRITE, Mount
from overt.server.poison import serve_hidden
from overt.tree.layer import DescriptorCache

_LOOKS = 40
"""how often to look for the next request before sleeping, about a microsecond each"""
_QUIET = 10
"""after how many of them what can wait is done"""
_TURN = 64
"""how many requests of one mount are served before the others are looked at"""
_BUFFER = MAX_WRITE + 8192


class Engine:
    """The thread that calls `run` handles the requests of every mount that was added."""

    def __init__(self, events: Events, descriptors: int) -> None:
        """`descriptors`: how many directory descriptors to keep open at most."""
        self.events = events
        self.cache = DescriptorCache(descriptors)
        self.mounts: dict[int, Mount] = {}
        self.gone: Callable[[Mount], None] = lambda mount: None
        """called when the kernel has let go of a mount"""
        self._epoll = select.epoll()
        self._posted: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._watched: dict[int, Callable[[], None]] = {}
        self._thread = 0
        self._running = True

    def post(self, call: Callable[[], None]) -> None:
        """Have `call` made by the loop; any thread."""
        self._posted.append(call)
        os.eventfd_write(self._wake, 1)

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        """Have `call` made whenever `fd` is readable."""
        self._watched[fd] = call
        self._epoll.register(fd, select.EPOLLIN)

    def add(self, mount: Mount) -> None:
        """Serve a mount from now on; any thread."""
        mount.handlers = TABLE
        mount.serve_hidden = serve_hidden

        def enter() -> None:
            self.mounts[mount.fd] = mount
            self._epoll.register(mount.fd, select.EPOLLIN)

        self.post(enter)

    def stop(self) -> None:
        """Make `run` return; any thread."""

        def halt() -> None:
            self._running = False

        self.post(halt)

    def run(self) -> None:
        """Serve until `stop`."""
        self._thread = threading.get_native_id()
        buffer = bytearray(_BUFFER)
        mounts = self.mounts
        while self._running:
            ready = self._epoll.poll()
            alone = len(ready) == 1
            for fd, _ in ready:
                mount = mounts.get(fd)
                if mount is not None:
                    try:
                        self._serve(mount, buffer, alone=alone)
                    except Exception:
                        self.events.crash(f"serving {mount.target}, which is given up")
                        self._lose(mount)
                elif fd == self._wake:
                    os.eventfd_read(self._wake)
                    while self._posted:
                        self._call(self._posted.popleft())
                else:
                    self._call(self._watched[fd])

    def _call(self, call: Callable[[], None]) -> None:
        """Nothing that is done for one mount or one client may end the loop for all."""
        try:
            call()
        except Exception:
            self.events.crash("the engine's loop")

    def _serve(self, mount: Mount, buffer: bytearray, *, alone: bool) -> None:
        fd = mount.fd
        into = [buffer]
        readv, handle, trim = os.readv, mount.handle, self.cache.trim
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
                    trim()
                if leaving:
                    return
                continue
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted, or aborted
                    self._lose(mount)
                    return
                if error.errno in (errno.ENOENT, errno.EINTR):  # the request was withdrawn before it was read
                    continue
                raise
            handle(buffer, size)
            looks = 0
            served += 1
            if served == _TURN or self._posted:
                trim()
                return  # others have their turn; what is left to read makes epoll come back

    def _lose(self, mount: Mount) -> None:
        self._epoll.unregister(mount.fd)
        del self.mounts[mount.fd]
        mount.gone = True
        # On a thread of its own: it waits for the workers, and must not keep one of them from its work.
        threading.Thread(target=self._bury, args=(mount,), daemon=True).start()

    def _bury(self, mount: Mount) -> None:
        """Close what a mount held, once its workers have ended."""
        try:
            mount.close()
        except OSError as error:
            self.events.say("close failed", mount=mount.target, why=str(error))
        self.gone(mount)
