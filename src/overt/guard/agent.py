"""The worker: takes containers' syncfs(2) calls and answers them.

    listener ── receive ── which overlay? ─┬─ none, or the kernel is right: the call continues
                                           └─ flush its upper (overt.upper) ── judge (guard/overlay.py) ── answer

The loop looks and never waits: not for a FUSE server that a container may run, not for a process, and for a disk only
where another thread takes over after a moment (guard/loop.py). When several call at once, the upper's flusher flushes
for all of them. So a disk that hangs keeps only its own containers.

What is looked up by a thread id is the caller's if the notification is still valid afterwards: the thread was then
blocked in this call all the while, and the id not another's. The answer itself fails if it is not; where more than an
answer depends on it SECCOMP_IOCTL_NOTIF_ID_VALID is asked.

An error in here is EIO for the caller and an event. It is never success.
"""

import errno
import json
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from overt.events import Events
from overt.guard import container, descriptions, listener, opening, overlay, resume, status, table, victims
from overt.guard.container import Container
from overt.guard.crowd import Crowd
from overt.guard.loop import Loop
from overt.guard.meter import Meter
from overt.guard.overlay import Overlay, Resources
from overt.guard.records import Records
from overt.guard.slots import Notification, Slots
from overt.guard.store import MESSAGE, MOST_FDS, Entry, Keeper
from overt.guard.table import Mounted
from overt.guard.victims import Loss
from overt.host.marks import Marks
from overt.ledger import UpperError
from overt.upper import Upper, Uppers
from overt.upper.trace import Trace
from overt.wire.seccomp import SYNCFS

_MOST_WAITING = 4096
"""calls of one listener at a time; the others wait in the kernel"""
_NOBODY_WAITS = (errno.ENOENT, errno.EINPROGRESS)
"""answering fails so if the caller was killed or interrupted, or if somebody else has answered"""
_LOSSES = 1000
_TELLING = 1.0
"""seconds after an error in which those who ask are told, before its files are looked for"""
_WALK = 5.0
"""seconds between two looks whether descriptions that are held are still open"""


class Agent:
    """See above. `supervisor` is one end of the pair over which containers come and the store is kept."""

    def __init__(
        self, supervisor: socket.socket, status: socket.socket, slots: Slots, trace: Trace | None, marks: Marks | None,
        events: Events, generation: int, blame: str,
    ) -> None:  # fmt: skip
        self.supervisor = supervisor
        self.status_socket = status
        self.slots = slots
        self.trace = trace
        self.events = events
        self.generation = generation
        self.blame = blame
        """whom to tell of an error: ``all``, or ``owner``, the containers whose files were lost, if that is certain"""
        self.losses: deque[dict[str, Any]] = deque(maxlen=_LOSSES)
        """files that were lost, the newest"""
        self.keeper = Keeper(supervisor)
        self.records = Records(self.keeper, trace)
        self.uppers = Uppers(self._error, trace=trace or False)
        self.shared = Resources(self.keeper, self.uppers, self.records, marks)
        self.table = table.Table()
        self.containers: dict[int, Container] = {}
        self.overlays: dict[int, Overlay] = {}
        self.crowds: dict[int, Crowd] = {}
        """by upper"""
        self.doubtful = 0
        self.answered = 0
        self.meter = Meter()
        self.lock = threading.Lock()
        self.loop = Loop()
        self._skip = {os.getpid(), os.getppid()}
        self._orphan = False
        self._walker: threading.Thread | None = None

    # From its beginning to its end

    def run(self, entries: dict[str, Entry]) -> None:
        """Serve until `stop`, or until the supervisor is gone and the last container has ended.

        `entries`: what the worker before this one has left.
        """
        resume.restore(self, entries)
        self.loop.watch(self.supervisor.fileno(), self._from_supervisor)
        self.loop.watch(self.status_socket.fileno(), self._show)
        self.loop.run(_WALK, self._walk)
        for each in list(self.overlays.values()):
            each.close()  # and with the last on an upper, its eyes; the tracepoint is the supervisor's

    def stop(self) -> None:
        """End `run`; for signal handlers."""
        self.loop.stop()

    # Containers come and go

    def _from_supervisor(self, what: int) -> None:
        data, fds, flags, _ = socket.recv_fds(self.supervisor, MESSAGE, MOST_FDS)
        if flags & socket.MSG_CTRUNC:  # the next worker has the listener from its beginning
            raise OSError(errno.EMFILE, "no descriptor left for a container's listener")
        if data:
            head, _, state = data.partition(b"\n")
            self.add(int(head), state, fds)
            return
        self.loop.forget(self.supervisor.fileno())
        self.events.say("supervisor gone", why="this worker ends with the last container it has")
        self._orphan = True
        if not self.containers:
            self.loop.stop()

    def add(self, number: int, data: bytes, fds: list[int]) -> None:
        """Take a container's listener out of `fds`; close what else came with it."""
        try:
            state = container.read(data, fds)
            fd = fds.pop(state.listener)
        except ValueError as error:
            self.events.say("container refused", why=str(error))
            self.keeper.drop(f"listener/{number}")
            return
        finally:
            for each in fds:
                os.close(each)
        guarded = self.containers[number] = Container(number, state, fd)
        if state.unread:
            self.events.say("state not read", container=state.id, why=state.unread)
        self.events.say("guarding", container=state.id, pid=state.pid, bundle=state.bundle)
        self.loop.watch(fd, lambda what: self._ready(guarded, what))
        self.apart(opening.look_around, self, guarded)

    def _gone(self, guarded: Container) -> None:
        """The last task with this filter has ended."""
        with self.lock:  # `done`, on another thread, must not look at a listener that is not watched any more
            guarded.closed = True
            self.loop.forget(guarded.fd)
            del self.containers[guarded.number]
            self._resume(guarded)
            for crowd in self.crowds.values():
                crowd.forget(guarded.number)
        self.keeper.drop(f"listener/{guarded.number}")
        opening.leave(self, guarded)
        self.events.say("ended", container=guarded.state.id, calls=guarded.calls)
        if self._orphan and not self.containers:
            self.loop.stop()

    # A call

    def _ready(self, guarded: Container, what: int) -> None:
        if not what & select.EPOLLIN:
            self._gone(guarded)
            return
        with self.lock:
            many = guarded.receiving or guarded.waiting >= _MOST_WAITING
            slot = -1 if many else self.slots.take(guarded.number)
            if slot < 0:
                guarded.paused = True
                self.loop.pause(guarded.fd)
                return
            guarded.receiving = True
        self.loop.long(lambda: self._receive(guarded, slot))

    def _receive(self, guarded: Container, slot: int) -> None:
        """Take the call. It waits if somebody else has taken it: a process that has its own listener."""
        try:
            listener.receive(guarded.fd, self.slots.address(slot))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINTR):
                raise
            self.slots.free(slot)  # the caller was killed, or a signal came, before we were
            slot = -1
        with self.lock:
            guarded.receiving = False
            guarded.waiting += slot >= 0
            guarded.calls += slot >= 0
            self._resume(guarded)
        if slot >= 0:
            self.begin(guarded, slot, self.slots.read(slot))

    def _resume(self, guarded: Container) -> None:
        """Take further calls, as far as there is room; let go of the listener of one that has ended. Under the lock."""
        if guarded.closed:
            if not guarded.receiving and not guarded.waiting and guarded.fd >= 0:
                os.close(guarded.fd)
                guarded.fd = -1
        elif guarded.paused and not guarded.receiving and guarded.waiting < _MOST_WAITING:
            guarded.paused = False
            self.loop.pause(guarded.fd, paused=False)

    def begin(self, guarded: Container, slot: int, call: Notification) -> None:
        """Answer a call that was received, here or on another thread."""
        self.meter.begin(slot, guarded.number)
        self.begin_again(guarded, slot, call)

    def begin_again(self, guarded: Container, slot: int, call: Notification, *, look_up: bool = False) -> None:
        """The same, of one that was begun already."""
        try:
            self._begin(guarded, slot, call, look_up)
        except table.Unknown:
            guarded.lookups.do(lambda: self.begin_again(guarded, slot, call, look_up=True))
        except Exception:
            self._crash(guarded, slot, call)

    def _begin(self, guarded: Container, slot: int, call: Notification, look_up: bool) -> None:
        try:
            found = self._overlay_of(guarded, call, look_up)
            if isinstance(found, Mounted):
                opening.open_first(self, guarded, slot, call, found)
                return
        except ProcessLookupError:  # the caller or its container has ended
            self.reply(guarded, slot, call, errno.EIO)
            self.done(guarded, slot)
        except OSError as error:
            self.not_guarded(guarded, slot, call, "", str(error))
        else:
            if found is None:
                self._continue(guarded, slot, call)
            else:  # if others call as well, one flush will do for all
                self.flush(found, guarded, slot, call, here=not look_up and self.loop.may_take_long())

    def _overlay_of(self, guarded: Container, call: Notification, look_up: bool) -> Overlay | Mounted | None:
        """The overlay that a call is about; the mount, if whose it is is not known; None: the kernel is right.

        OSError; Unknown if it is to be looked up.
        """
        if (call.arch, call.number) not in SYNCFS:
            return None
        if guarded.state.unread:
            raise OSError(errno.EIO, guarded.state.unread)
        if not call.tid:
            raise OSError(errno.ENXIO, "the caller is in another pid namespace")
        place = b"/proc/%d/fd/%d" % (call.tid, call.argument)
        try:
            if descriptions.is_path(place):
                return None
            mounted = self.table.mount_of(place, (call.tid, guarded.state.pid)) if look_up else self.table.known(place)
        except FileNotFoundError:  # EBADF
            return None
        if isinstance(mounted, int):
            return opening.of_number(self, mounted)
        if not mounted.lies:
            return None
        found = self.overlays.get(mounted.device)
        if found is not None and mounted.id in found.mounts and guarded.number in found.users:
            return found
        if not listener.is_valid(guarded.fd, call.id):
            raise ProcessLookupError(errno.ESRCH, "the caller has ended")
        return mounted

    def not_guarded(self, guarded: Container, slot: int, call: Notification, name: str, why: str) -> None:
        """The call is not answered as it should be, but with EIO. `name`: of the overlay, if that is known."""
        self.events.say("not guarded", container=guarded.state.id, overlay=name, why=why)
        self.reply(guarded, slot, call, errno.EIO)
        self.done(guarded, slot)

    def flush(self, each: Overlay, guarded: Container, slot: int, call: Notification, *, here: bool = False) -> None:
        upper = each.upper
        assert upper is not None

        def send(code: int) -> bool:
            sent = self.reply(guarded, slot, call, code)
            if code and sent:
                self.meter.told += 1
                self.events.say("told", container=guarded.state.id, overlay=each.name, error=code)
            return sent

        def flushed(failure: OSError | None) -> None:
            try:
                while not each.judge(call.tid, call.argument, failure, send):
                    self._settle(upper)
            except Exception:
                self._crash(guarded, slot, call)
            else:
                self.done(guarded, slot)  # not before what was told is on record

        with self.lock:
            crowd = self.crowds.get(upper.s_dev)
            if crowd is None:
                crowd = self.crowds[upper.s_dev] = Crowd()
        try:
            if not crowd.gather(guarded.number, flushed, upper.flush):
                (upper.flush_here if here else upper.flush)(flushed)
        except RuntimeError as error:
            flushed(OSError(errno.EIO, str(error)))  # the last container on this upper has ended meanwhile

    def _settle(self, upper: Upper) -> None:
        """An error has become known: before the first is told, see who is open. On the upper's flusher."""
        with self.lock:
            accounts = [(each, each.account) for each in self.overlays.values() if each.upper is upper]
        owed = {each.device: each for each, account in accounts if account is not None and account.owed() is not None}
        if self.blame == "owner":
            owed = self._without_bystanders(upper, owed)
        for each, why in overlay.hold_open_ones(owed, self.table, self._skip).items():
            self.events.say("not all known", overlay=each.name, why=why)

    def _without_bystanders(self, upper: Upper, owed: dict[int, Overlay]) -> dict[int, Overlay]:
        """Those of the overlays that are to be told: the owners of what was lost, or all if that is not certain."""
        newest = upper.ledger.newest
        accounts = {device: each.account for device, each in owed.items()}  # `retire` takes it away meanwhile
        since = {device: account.reached for device, account in accounts.items() if account is not None}
        if newest is None or not since:
            return owed
        found = self._name(upper, min(since.values()), victims.AT_ONCE)
        kept = {}
        for device, each in owed.items():
            owners = victims.owners(upper.failed(since.get(device, 0)), found)
            if owners is None or each in owners:
                kept[device] = each
            else:
                each.spare(newest)
        return kept

    def _name_later(self, upper: Upper, since: int) -> None:
        time.sleep(_TELLING)
        self._name(upper, since, victims.LATER)

    def _name(self, upper: Upper, since: int, seconds: float) -> dict[int, list[Loss]]:
        """Find, within `seconds`, the files that were lost in the errors numbered above `since`, and say so."""
        with self.lock:
            others = [each for each in self.overlays.values() if each.upper is upper]
        number = upper.ledger.count
        found = victims.find(others, upper.failed(since) or {}, seconds)
        for losses in found.values():
            for loss in losses:
                with self.lock:
                    users = [self.containers[user] for user in loss.overlay.users if user in self.containers]
                users.sort(key=lambda each: each.image)  # of a process that joined, nobody may have said it
                for user in {each.state.id: each for each in users}.values():
                    said = {
                        "container": user.state.id, "image": user.image, "path": loss.path, "certain": loss.certain,
                    }  # fmt: skip
                    if not any(said.items() <= known.items() and known["number"] == number for known in self.losses):
                        self.losses.append({"upper": upper.s_dev, "number": number, **said})
                        self.events.say("file lost", number=number, **said)
        return found

    def reply(self, guarded: Container, slot: int, call: Notification, code: int) -> bool:
        """Have the call return 0, or fail with `code`; False if nobody waits any more."""
        if code:
            self.slots.telling(slot, code)
        try:
            listener.answer(guarded.fd, call.id, code)
        except OSError as error:
            if error.errno not in _NOBODY_WAITS:
                raise
            return False
        self.answered += 1
        return True

    def _continue(self, guarded: Container, slot: int, call: Notification) -> None:
        try:
            listener.let_continue(guarded.fd, call.id)
        except OSError as error:
            if error.errno not in _NOBODY_WAITS:
                raise
        self.done(guarded, slot)

    def _crash(self, guarded: Container, slot: int, call: Notification) -> None:
        self.events.crash(f"syncfs of {guarded.state.id}")
        self.reply(guarded, slot, call, errno.EIO)
        self.done(guarded, slot)

    def done(self, guarded: Container, slot: int) -> None:
        """The call was answered, or nobody waits for it any more."""
        self.meter.end(slot)
        self.slots.free(slot)
        with self.lock:
            guarded.waiting -= 1
            self._resume(guarded)

    # What happens beside the calls

    def _error(self, error: UpperError, upper: Upper) -> None:
        """An upper has recorded an error. On any thread."""
        self.meter.errors += 1
        device = f"{os.major(upper.s_dev)}:{os.minor(upper.s_dev)}"
        names = [account.name for account in upper.ledger.accounts]
        self.events.say(
            "upper error", upper=device, number=error.number, error=error.errno, source=error.source,
            taken=error.taken, overlays=len(names),
        )  # fmt: skip
        self.records.keep(upper)
        if self.blame != "owner" and error.source in ("probe", "trace") and not error.taken:
            self.apart(self._name_later, upper, error.number - 1)

    def _walk(self) -> None:
        """Let go of what has ended, and of descriptions that nobody has any more; on threads of their own."""
        with self.lock:  # others may have had all the room
            for guarded in self.containers.values():
                self._resume(guarded)
        if self._walker is None or not self._walker.is_alive():
            self._walker = self.apart(self._look_after)

    def _look_after(self) -> None:
        opening.bury(self)
        held = {each.device: each for each in list(self.overlays.values()) if each.held.entries or each.incomplete}
        if held:
            overlay.let_go_of_closed_ones(held, self.table, self._skip)

    def _show(self, what: int) -> None:
        """Somebody asks for the status: one JSON object."""
        connection, _ = self.status_socket.accept()

        def tell() -> None:
            with connection, suppress(OSError):
                connection.settimeout(_WALK)
                connection.sendall(json.dumps(status.describe(self)).encode() + b"\n")

        self.apart(tell)

    def apart(self, act: Callable[..., object], *args: Any) -> threading.Thread:
        """Do something on a thread of its own; that it fails is an event."""

        def run() -> None:
            try:
                act(*args)
            except Exception:
                self.events.crash(getattr(act, "__name__", "a thread"))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread
