"""The process that holds the listeners, so that none is ever closed while its container lives.

A listener that is closed turns every later syncfs(2) of its container into ENOSYS, for good. So this process does
little that can go wrong: it accepts the runtime's connection, keeps what comes (guard/store.py), hands it on, and when
the worker has died it forks another, which finds everything in its memory. It reads nothing that a container can write.

What it holds of a container's files it closes on other threads (guard/closing.py), for that may ask a server that never
answers. If such a thread is stuck, this process cannot end before the server does.

SIGTERM ends both. SIGHUP replaces the worker.
"""

import errno
import json
import os
import resource
import select
import signal
import socket
import stat
import struct
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

from overt.events import Events, leave
from overt.guard import container
from overt.guard.agent import Agent
from overt.guard.slots import Slots
from overt.guard.store import MESSAGE, MOST_FDS, Store
from overt.host import memory, process
from overt.host.marks import Marks
from overt.upper.trace import Trace

CAPABILITIES = {"dac_override", "dac_read_search", "fowner", "sys_admin", "sys_ptrace"}
"""kept: to reach uppers, to mount the probes there, and to look at containers' descriptors"""
_CREDENTIALS = struct.Struct("=iII")
_STATE = 1 << 20
"""bytes of a container process state, at most"""
_KEPT = 1 << 16
"""bytes of what is used of it, at most"""
_MOST_GIVEN = 253
"""descriptors with one message (SCM_MAX_FD in the kernel's include/net/scm.h); if it were fewer, some would be lost"""
_PATIENCE = 10.0
"""seconds for a runtime to say what it has to say"""
_MOST_CALLERS = 4096
"""runtimes that are heard at the same time; the others wait in the kernel"""
_PAUSE = 0.05
"""seconds between two workers that die young; and for one that is about to be dead"""
_YOUNG = 1.0
_AGAIN = 0.5
"""seconds until the next attempt, where there can be no worker at present"""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_GONE = (FileNotFoundError, ProcessLookupError)


class _Caller:
    """A runtime that has connected."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.data = bytearray()
        self.fds: list[int] = []
        self.heard = False
        """its listener is taken, and what else it says is of no interest"""
        self.deadline = time.monotonic() + _PATIENCE

    def drop(self) -> None:
        self.connection.close()
        for fd in self.fds:
            os.close(fd)


class Supervisor:
    """See above. `path` is the socket that profiles name as listenerPath; `path`.status tells the status."""

    def __init__(
        self, path: Path, events: Events, blame: str = "all", *, handed: Mapping[str, socket.socket] | None = None
    ) -> None:
        """Listen, on sockets `handed` over by systemd where they have our paths; `blame` as in `Agent`.

        OSError: EADDRINUSE where a guard listens already.
        """
        self.path = path
        self.events = events
        self.blame = blame
        self.store = Store()
        self.slots = Slots()
        self.trace: Trace | None = None
        self.marks: Marks | None = None
        self.workers = 0
        self._callers: dict[int, _Caller] = {}
        self._poll = select.poll()  # not select(2), which takes no descriptor above 1023
        self._looked = 0.0
        self._number = 0
        self._ending = self._replacing = False
        self._dying: list[int] = []
        """workers that are dead but for a thread that waits for a disk"""
        self._unsent: deque[tuple[int, str]] = deque()
        handed = handed or {}
        self._ours = [each for each in (path, status_path(path)) if str(each) not in handed]
        self._socket = handed.get(str(path)) or listen(path)
        try:
            self._status = handed.get(str(status_path(path))) or listen(status_path(path))
        except OSError:
            if path in self._ours:
                path.unlink()
            raise
        missing = sorted(CAPABILITIES - process.capabilities())
        without = ", ".join(missing)
        self.lacking = f"containers' descriptors or uppers are out of reach without {without}" if missing else ""
        """what it cannot do for want of capabilities, in words; or empty"""
        if missing:
            events.say("not root", why=self.lacking)
        try:
            self.trace = Trace()
        except OSError as error:
            events.say("no tracepoint", why=str(error))
        try:
            self.marks = Marks()
        except OSError as error:
            events.say("no marks", why=f"{error}: overlays cannot be told apart, and every syncfs on one is EIO")

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._signal)
        try:
            while not self._ending:
                started = time.monotonic()
                try:
                    pid, worker = self._fork(wake, woken)
                except OSError as error:  # calls and runtimes wait in the kernel
                    self.events.say("no worker", why=str(error))
                    time.sleep(_AGAIN)
                    continue
                self._serve(pid, worker, wake)
                if not self._ending and time.monotonic() - started < _YOUNG:
                    time.sleep(_PAUSE if self.workers > 3 else 0)
        finally:
            self._bury(_PATIENCE)
            self.close()

    def close(self) -> None:
        """Remove the sockets that were made, and look no more."""
        for path in self._ours:
            path.unlink(missing_ok=True)
        if self.trace:
            self.trace.close()
        if self.marks:
            self.marks.close()

    def _signal(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            self._replacing = True
        else:
            self._ending = True

    def _fork(self, *ours: int) -> tuple[int, socket.socket]:
        """Start a worker: its pid, and our end of the pair between us. OSError: there is no room for either."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (here, there):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MESSAGE)
        self._replacing = False
        self._unsent.clear()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until the worker has handlers of its own
        try:
            pid = os.fork()
        except OSError:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            here.close()
            there.close()
            raise
        self.workers += 1
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            there.close()
            here.setblocking(False)
            return pid, here
        here.close()
        self._work(there, ours)

    def _work(self, pair: socket.socket, ours: tuple[int, ...]) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            for fd in ours:
                os.close(fd)
            self._socket.close()
            for caller in self._callers.values():
                caller.drop()
            process.make_room_for_descriptors()  # a table is copied with no more room than it needs
            agent = Agent(pair, self._status, self.slots, self.trace, self.marks, self.events, self.workers, self.blame)
            signal.set_wakeup_fd(agent.loop.bell, warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: agent.stop())
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            agent.run(self.store.inherit())
            status = 0
        except Exception:
            self.events.crash("the worker")
        finally:
            leave(status)

    def _serve(self, pid: int, worker: socket.socket, wake: int) -> None:
        """Until this worker has ended."""
        killed_at = float("inf")
        with worker:
            while True:
                ready = self._wait(worker, wake)
                if wake in ready:
                    os.read(wake, 64)
                    if self._ending or self._replacing:
                        os.kill(pid, signal.SIGTERM if self._ending else signal.SIGKILL)
                        killed_at = time.monotonic()
                if time.monotonic() > killed_at + _PATIENCE:  # it waits for a disk
                    os.kill(pid, signal.SIGKILL)
                if worker.fileno() in ready:
                    if not self._hear(worker):
                        os.kill(pid, signal.SIGKILL)  # if it has not ended: it is not to be trusted
                        break
                elif self._time_to_look(ready) and _is_dying(pid):
                    while self._hear(worker):  # what it has said since the poll
                        pass
                    break
                if self._socket.fileno() in ready:
                    self._accept()
                for fd in self._late() | (ready & self._callers.keys()):
                    self._listen_to(self._callers[fd])
                self._hand_over(worker)
                self._bury(0)
        if not self._ending:
            left = sum(name.startswith("listener/") for name in self.store.entries)
            self.events.say("worker ended", pid=pid, containers=left)
        self._dying.append(pid)
        self._bury(_PAUSE)

    def _hear(self, worker: socket.socket) -> bool:
        """Take a message of the worker's; False where there is none, or if it makes no sense.

        That must not end this process.
        """
        try:
            return self.store.hear(worker)
        except (ConnectionError, BlockingIOError):
            return False
        except Exception:
            self.events.crash("a message of the worker's")
            return False

    def _bury(self, patience: float) -> None:
        """Reap workers that have ended, waiting at most `patience` seconds for those that are about to."""
        deadline = time.monotonic() + patience
        while True:
            self._dying = [pid for pid in self._dying if os.waitpid(pid, os.WNOHANG)[0] == 0]
            if not self._dying or time.monotonic() >= deadline:
                return
            time.sleep(0.002)

    def _wait(self, worker: socket.socket, wake: int) -> set[int]:
        """The descriptors that have something to say."""
        self._poll.register(wake, select.POLLIN)
        self._poll.register(self._socket, select.POLLIN if len(self._callers) < _MOST_CALLERS else 0)
        self._poll.register(worker, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        try:
            return {fd for fd, what in self._poll.poll(1000) if what != select.POLLOUT}
        finally:
            self._poll.unregister(worker)

    def _time_to_look(self, ready: set[int]) -> bool:
        """Whether to look for what nobody tells: when there is nothing to do, and every second."""
        now = time.monotonic()
        if ready and now < self._looked + 1:
            return False
        self._looked = now
        return True

    def _late(self) -> set[int]:
        """Runtimes that have had their time; they are in the order in which they came."""
        now = time.monotonic()
        return {fd for fd, _ in takewhile(lambda each: now > each[1].deadline, self._callers.items())}

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as error:  # no descriptor left, or it has gone already
            self.events.say("refused", why=str(error))
            time.sleep(_PAUSE)
            return
        _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid not in (0, os.geteuid()):
            self.events.say("refused", uid=uid, why="only root and this user may bring containers")
            connection.close()
            return
        connection.setblocking(False)
        self._callers[connection.fileno()] = _Caller(connection)
        self._poll.register(connection, select.POLLIN)

    def _listen_to(self, caller: _Caller) -> None:
        """Take what a runtime says, until it is whole: some runtimes close the connection when the container ends."""
        try:
            data, fds, _, _ = socket.recv_fds(caller.connection, _KEPT, _MOST_GIVEN)
            caller.data += data
            caller.fds += fds
        except BlockingIOError:
            data = b" "
        except OSError:
            data = b""
        if len(caller.data) > _STATE and not caller.heard:
            self._keep_listeners(caller, f"{len(caller.data)} bytes of state")
        if caller.heard:
            caller.data.clear()
        bad = len(caller.data) > _STATE or len(caller.fds) > MOST_FDS or time.monotonic() > caller.deadline
        if data and not bad and not (caller.fds and not caller.heard and _is_whole(caller.data)):
            return
        del self._callers[caller.connection.fileno()]
        self._poll.unregister(caller.connection)
        why = f"{len(caller.data)} bytes and {len(caller.fds)} descriptors from a runtime"
        if not caller.heard and not bad and caller.fds:
            state = container.shorten(bytes(caller.data))
            if len(state) <= _KEPT:
                self._keep(state, caller.fds)
                caller.fds, caller.heard = [], True
        if not caller.heard:
            self._keep_listeners(caller, why)
        only_looked = not (data or caller.data or caller.fds)  # whether somebody listens, as `guard run` and `check` do
        if not caller.heard and not only_looked:
            self.events.say("refused", why=why)
        caller.drop()

    def _keep_listeners(self, caller: _Caller, why: str) -> None:
        """Take listeners that come with no state, or one that cannot be used: the worker answers EIO for them.

        Not to take one would close it, and have its container run on without: ENOSYS.
        """
        listeners = [fd for fd in caller.fds if container.is_listener(fd)]
        caller.fds = [fd for fd in caller.fds if fd not in listeners]
        for fd in listeners:
            self.events.say("state too large or too late", why=why)
            self._keep(b"", [fd])
            caller.heard = True

    def _keep(self, state: bytes, fds: Sequence[int]) -> None:
        self._number += 1
        name = f"listener/{self._number}"
        self.store.put(name, state.decode(errors="replace"), fds)
        self._unsent.append((self._number, name))

    def _hand_over(self, worker: socket.socket) -> None:
        """Give new containers to the worker, as far as it takes them now."""
        while self._unsent:
            number, name = self._unsent[0]
            entry = self.store.entries.get(name)
            if entry is not None:
                try:
                    socket.send_fds(worker, [b"%d\n" % number, entry.value.encode()], entry.fds)
                except (BlockingIOError, ConnectionError):  # later, or it has died: the next finds it
                    return
                except OSError:  # no memory, or too many descriptors on their way: later, though it would take more
                    time.sleep(_PAUSE)
                    return
            self._unsent.popleft()


def _is_dying(pid: int) -> bool:
    """Whether a process was killed, and what is left of it waits for a disk: it will never come back to its program.

    The kernel makes every fatal signal a SIGKILL, pending for each thread. Where this process has no descriptor to look
    with, it is not.
    """
    try:
        with open(f"/proc/{pid}/status") as status:
            pending = [int(line.split()[1], 16) for line in status if line.startswith(("SigPnd:", "ShdPnd:"))]
        states = [_state(f"/proc/{pid}/task/{tid}/stat") for tid in os.listdir(f"/proc/{pid}/task")]
        killed = any(bits >> signal.SIGKILL - 1 & 1 for bits in pending) or _state(f"/proc/{pid}/stat") in "ZX"
    except _GONE:  # not even that is left
        return True
    except OSError:
        return False
    return killed and all(state in "ZXD" for state in states)


def _state(path: str) -> str:
    """A thread's state, a letter (proc_pid_stat(5)); X if it is gone. OSError: there is no descriptor to look with."""
    try:
        with open(path) as stat:
            return stat.read().rpartition(")")[2].split()[0]
    except _GONE:
        return "X"


def _is_whole(data: bytearray) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):  # the worker says what is wrong with it, when the connection ends
        return False
    return True


def status_path(path: Path) -> Path:
    """The socket that tells the status of the guard that listens on `path`."""
    return path.with_name(path.name + ".status")


def ask(path: Path, patience: float = _PATIENCE) -> dict[str, object]:
    """The status of the guard that listens on `path`; OSError if there is none, or none after `patience` seconds."""
    deadline = time.monotonic() + patience

    def receive() -> bytes:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        return connection.recv(1 << 16)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(patience)
        try:
            connection.connect(os.fspath(status_path(path)))
            data = b"".join(iter(receive, b""))
        except TimeoutError:
            why = f"no answer within {patience:g} s (is the guard stopped, or the machine very busy?)"
            raise TimeoutError(errno.ETIMEDOUT, why, os.fspath(path)) from None
        except OSError as error:
            # That a path is too long comes without a number.
            why = f"{error.strerror} ({_advice(error)})" if error.errno else str(error)
            raise OSError(error.errno or errno.ENAMETOOLONG, why, os.fspath(path)) from None
    try:
        return dict(json.loads(data))
    except ValueError:  # there is nothing, or a piece
        raise OSError(errno.EPIPE, "the guard's worker ended while it was asked: ask again", os.fspath(path)) from None


def _advice(error: OSError) -> str:
    """What to do about a guard that cannot be asked."""
    if isinstance(error, PermissionError):
        return "a guard answers root and its own user"
    if os.geteuid():
        return "is `overt guard run` running? To ask root's guard, be root"
    return "is `overt guard run` running? --socket names another"


def listen(path: Path) -> socket.socket:
    """A listening unix socket, mode 0600, in the place of one that nobody listens on any more.

    OSError: EADDRINUSE where a guard listens already, EEXIST where there is a file that is no socket.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "there is a file that is not a socket", str(path))
    mask = os.umask(0o177)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _make_way(path)
        listening.bind(os.fspath(path))
        listening.listen(512)
    except OSError as error:  # it does not say of what, and of a path that is too long it has no number
        listening.close()
        raise OSError(error.errno or errno.ENAMETOOLONG, error.strerror or str(error), str(path)) from None
    finally:
        os.umask(mask)
    return listening


def _make_way(path: Path) -> None:
    """Remove what is left of a guard that was killed. OSError: EADDRINUSE."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
        except FileNotFoundError:
            pass
        else:
            raise OSError(errno.EADDRINUSE, "a guard listens already")


def prepare() -> None:
    """Take as many descriptors as the machine gives, and give up the capabilities that are not needed.

    Two processes hold each listener, and each description that is owed an error.
    """
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):  # without CAP_SYS_RESOURCE the hard limit is what there is
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    process.make_room_for_descriptors()
    memory.one_arena()
    if os.geteuid() == 0:
        process.keep_capabilities(CAPABILITIES)
