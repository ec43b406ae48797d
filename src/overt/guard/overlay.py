"""One overlay that is guarded: its account in the upper's ledger, and who in it is yet to be told.

All that decides what a syncfs(2) is answered is in `judge`. It asks the ledger, and keeps for it what the kernel would
keep in each open file (f_sb_err): the position of each description that was open when an error became known.

An overlay is a superblock. It goes by its device number, which is the next one's when it has ended. So its superblock
is marked (host/marks.py) before anything is known of it: as long as a mark is left, the number is still this one's. A
mount has one superblock for ever, and so a mount that was seen to be of it needs no further question (`mounts`).
"""

import contextlib
import errno
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from overt.guard import descriptions, places
from overt.guard.anchor import Anchor
from overt.guard.container import Container
from overt.guard.descriptions import Held, Loans
from overt.guard.places import Place
from overt.guard.records import Records
from overt.guard.room import Room
from overt.guard.slots import Notification
from overt.guard.store import Entry, Keeper
from overt.guard.table import FULL, Mounted, Table, Walk
from overt.host.files import whereabouts
from overt.host.marks import Marks
from overt.ledger import Account, Description, UpperError
from overt.upper import Upper, Uppers

Send = Callable[[int], bool]
Caller = tuple[Container, int, Notification, Mounted]
"""a call: whose, in which slot, and on which mount"""

_CARRIED = ("mounted_at", "reached", "cursor", "told", "heard", "spared", "left_out")
"""what the next worker needs of an account"""
_GONE = (errno.ENOENT, errno.ESRCH, errno.EBADF)
"""a descriptor that is looked at was closed, or its process has ended"""
_BEFORE = 0
"""the position of who was open before the first error that the cursor carries: it is told of any (errseq)"""
_TOLD = "/told"
"""at the end of the name of a description that was told when it was first held"""
_numbers = itertools.count(1)


class Ended(Exception):
    """The superblock of an overlay has ended, or the last container that had it."""


class Resources:
    """What all overlays of an agent share."""

    def __init__(self, keeper: Keeper, uppers: Uppers, records: Records, marks: Marks | None) -> None:
        self.keeper = keeper
        self.uppers = uppers
        self.records = records
        self.marks = marks
        self.room = Room()
        self.loans = Loans(self.room)


class Overlay:
    """See above. `door` is held while it is opened, `lock` while somebody is told; never across a flush."""

    def __init__(self, mounted: Mounted, shared: Resources, party: str, record: str = "") -> None:
        """`party`: whose share of the room it takes; `record`: the name that another worker has kept it by."""
        self.device = mounted.device
        self.mounted = mounted
        self.name = os.fsdecode(mounted.upperdir)
        self.party = party
        self.users: set[int] = set()
        """numbers of the listeners whose containers have it"""
        self.mounts: set[int] = set()
        """mounts that are known to be of it (`Mounted.id`)"""
        self.callers: list[Caller] = []
        """who waits for it to be opened; the agent's"""
        self.account: Account | None = None
        self.upper: Upper | None = None
        self.held = Held()
        self.incomplete = False
        """whether open descriptions that are owed an error may not be in `held`"""
        self.marked = False
        self.deserted = False
        """its last container has ended: who comes now, comes too late, and has another one made"""
        self.lock = threading.Lock()
        self.door = threading.Lock()
        self.record = record or f"{self.device}/{time.monotonic_ns()}"
        """its name in the store: of two with one number the later one is greater"""
        self._kept = bool(record)
        """whether it is in there"""
        self._leaving: Account | None = None
        self._lost: OSError | None = None
        self._closed = False
        self._shared = shared
        self._place: Place | None = None

    def open(self, anchor: Anchor, pids: list[int], uuid: bytes = b"") -> None:
        """Take a mount for one of this overlay's; open an account if there is none: errors count from now.

        `anchor` keeps the mount's superblock, so that nobody else has its number; it is let go as soon as there is a
        mark, and else by the caller. `pids` and `uuid`: see `places.find`. Raises Ended if this overlay was another
        superblock, OSError if its upper is not found.
        """
        mounted = anchor.mounted
        with self.door:
            if self._closed or self.deserted or (self.marked and self.has_ended()):
                raise Ended
            if self._lost is not None:
                raise self._lost
            if self.account is None:
                if not self.marked:
                    self.mounted, self.name = mounted, os.fsdecode(mounted.upperdir)
                    self._mark(anchor)
                self._open(pids, uuid)
            with self.lock:
                if self._closed:
                    raise Ended
                self.mounts.add(mounted.id)

    def _mark(self, anchor: Anchor) -> None:
        if self._shared.marks is None:
            raise OSError(errno.EOPNOTSUPP, "no fanotify: this overlay could be taken for a later one")
        self._shared.marks.put(anchor.path)
        self.marked = True
        anchor.close()

    def _open(self, pids: list[int], uuid: bytes) -> None:
        place = places.find(self.mounted, pids, uuid)
        try:
            upper = self._shared.uppers.get(place.beside, place.scratch)
            account = upper.attach(self.name, volatile=False)
            try:
                self._shared.records.keep(upper)  # a record of an overlay is no use without
            except BaseException:
                upper.detach(account)
                raise
        except BaseException:
            place.close()
            raise
        self.upper = upper
        with self.lock:
            if not self._closed:
                self._place = place
                self.account = account  # from now on calls are answered with it
                self.save()
                return
        with contextlib.ExitStack() as stack:
            stack.callback(place.close)
            upper.detach(account)
        raise Ended

    def has_ended(self) -> bool:
        """Whether its superblock has, of an overlay that was marked."""
        return self._shared.marks is None or self.device not in self._shared.marks.left()

    def restore(self, entry: Entry, errors: Mapping[int, list[UpperError]]) -> None:
        """Go on with what another worker has left; `errors` of uppers' ledgers, by superblock.

        Where that fails, with an OSError or in a way that it must not, whoever calls gets EIO, again and again: who was
        owed an error is not known any more.
        """
        self.marked = True
        place = self._place = Place(entry.fds[0], entry.fds[1], entry.value["scratch"], entry.fds[2])
        try:
            upper = self._shared.uppers.get(place.beside, place.scratch, entry.value["upper"])
            if not upper.ledger.errors:
                upper.ledger.errors.extend(errors.get(upper.s_dev, ()))
            account = upper.resume(self.name)
        except OSError as error:
            self._lost = error
            raise
        except Exception as error:
            self._lost = OSError(errno.EIO, repr(error))
            raise
        for name, value in entry.value["account"].items():
            setattr(account, name, value)
        self.incomplete = entry.value["incomplete"]
        self.upper, self.account = upper, account

    def save(self) -> None:
        """Have the supervisor keep the account. The caller has `lock`: what is kept last is the newest."""
        account, place, upper = self.account, self._place, self.upper
        assert account is not None and place is not None and upper is not None
        value = {
            "mounted": [self.device, *map(os.fsdecode, self.mounted[1:4]), self.mounted.volatile],
            "party": self.party,
            "upper": upper.s_dev,
            "scratch": place.name,
            "incomplete": self.incomplete,
            "account": {name: getattr(account, name) for name in _CARRIED},
        }
        name = f"overlay/{self.record}"
        if self._kept:
            self._shared.keeper.set(name, value)
        else:
            self._shared.keeper.put(name, value, [place.beside, place.scratch, place.upper])
            self._kept = True

    def retire(self) -> None:
        """Answer nobody any more, and have nothing kept of it: another one may get its number from now on."""
        with self.lock:
            self._closed = True
            self.mounts.clear()
            if self._place is not None and self._leaving is None:
                while self.held.entries:
                    self._let_go(-1)
                self._shared.keeper.drop(f"overlay/{self.record}")
            self._leaving, self.account = self._leaving or self.account, None

    def close(self) -> OSError | None:
        """Retire it and let go of the upper. Returns why our directory there could not be removed, or None."""
        self.retire()
        with self.lock:
            account, self._leaving = self._leaving, None
            place, self._place = self._place, None
        try:
            if account is not None and self.upper is not None:
                self.upper.detach(account)
        finally:
            why = place.close() if place is not None else None
        return why

    def upper_directory(self) -> int:
        """A descriptor of the upper directory, the caller's to close. OSError if the last container has ended."""
        with self.lock:
            if self._closed or self._place is None:
                raise ProcessLookupError(errno.ESRCH, "its last container has ended")
            return os.dup(self._place.upper)

    def is_older_than(self, number: int) -> bool:
        """Whether its errors count from before the one of this number."""
        account = self.account
        return account is not None and account.mounted_at < number

    def spare(self, error: UpperError) -> None:
        """Leave the errors up to this one to those whose files were lost: nobody here is told."""
        with self.lock:
            if self.account is not None:
                self.account.spare(error)
                self.save()

    def prune(self, seen: set[int]) -> None:
        """Let go of descriptions that nobody has had open for a while (see `Held.prune`). The caller has `lock`."""
        for fd, name in self.held.prune(seen):
            self._give_back(fd, name)

    def hold_again(self, fd: int, since: int, name: str) -> None:
        """Hold a description as another worker did."""
        told = name.endswith(_TOLD)
        added = None
        if self._shared.room.take(self.party, told=told):
            with contextlib.suppress(OSError):
                added = self.held.add(fd, Description(since), name)
            if added:
                return
            self._shared.loans.give_back(self.party, fd, told=told)
        else:
            self._shared.loans.drop(self.party, fd)
        self.incomplete |= added is None

    def hold(self, tid: int, fd: int, is_right: Callable[[bytes], bool], since: int) -> bool:
        """Hold the description behind descriptor `fd` of thread `tid`, at position `since`; False if there is no room.

        `is_right` as in `Loans.borrow`, whose OSError it raises. The caller has `lock`.
        """
        ours = self._shared.loans.borrow(self.party, tid, fd, is_right)
        if ours >= 0:
            self._enter(ours, since)
        return ours >= 0

    def _enter(self, ours: int, since: int, *, told: bool = False) -> None:
        """Hold the description that was borrowed as `ours`, or give it back if it is held already. OSError."""
        name = f"owed/{self.record}/{os.getpid()}/{next(_numbers)}" + _TOLD * told
        added = False
        try:
            added = self.held.add(ours, Description(since), name)
        finally:
            if not added:
                self._shared.loans.give_back(self.party, ours, told=told)
        if added:
            self._shared.keeper.put(name, since, [ours])

    def _let_go(self, at: int) -> None:
        self._give_back(*self.held.take(at))

    def _give_back(self, fd: int, name: str) -> None:
        self._shared.keeper.drop(name)
        self._shared.loans.give_back(self.party, fd, told=name.endswith(_TOLD))

    def judge(self, tid: int, fd: int, failure: OSError | None, send: Send) -> bool:
        """Answer a syncfs(2) on descriptor `fd` of thread `tid`, whose flush came to `failure`.

        False, and nothing is done, if an error is owed for which nobody has looked yet who is to be told.

        `send` takes an errno (or 0); False from it: the caller does not wait any more, and nobody was told.
        """
        with self.lock:
            account = self.account
            if account is None:  # its last container has ended
                send(0 if failure is None else failure.errno or errno.EIO)
                return True
            if account.owed() is not None:
                return False
            at, held = self._find(tid, fd)
            description = self.held.entries[at][1] if held else self._not_held(account)
            before = (account.cursor, account.told, account.heard, description.since)
            code = account.advance(description)
            # Before it is told: as soon as it is, the caller may have another file at that number.
            ours = self._borrow(tid, fd) if code and self.incomplete and not held else -1
            sent = False
            try:
                sent = send(code or (failure.errno or errno.EIO if failure else 0))
            finally:
                if ours >= 0 and not sent:
                    self._shared.loans.give_back(self.party, ours, told=True)
            if not code:
                return True
            if not sent:
                account.cursor, account.told, account.heard, description.since = before
                return True
            self.save()
            if held:
                self._told(at, description)
            elif ours >= 0:
                with contextlib.suppress(OSError):  # else it is told again, once too often
                    self._enter(ours, description.since, told=True)
            return True

    def _not_held(self, account: Account) -> Description:
        """The position of a description that is not held: it came later. If that is not known, it is owed an error."""
        return Description(_BEFORE) if self.incomplete else account.sample()

    def _borrow(self, tid: int, fd: int) -> int:
        """A duplicate of a description that is about to be told, to be held then: who is not held is told again.

        -1 if it cannot be had: it is told once too often.
        """
        with contextlib.suppress(OSError):
            return self._shared.loans.borrow(self.party, tid, fd, self._is_of_this, told=True)
        return -1

    def _is_of_this(self, place: bytes) -> bool:
        return whereabouts(place).mount in self.mounts

    def _told(self, at: int, description: Description) -> None:
        """Let go of a description that was told; but keep it while not all are known (see `_borrow`)."""
        if self.incomplete:
            ours, _, name = self.held.entries[at]
            self._shared.keeper.put(name, description.since, [ours])
        else:
            self._let_go(at)

    def _find(self, tid: int, fd: int) -> tuple[int, bool]:
        if not self.held.entries:
            return 0, False
        try:
            return self.held.find(tid, fd)
        except OSError:  # closed by another thread meanwhile: it counts as a new one
            return 0, False


def hold_open_ones(overlays: dict[int, Overlay], table: Table, skip: set[int]) -> dict[Overlay, str]:
    """Walk the machine and hold each open description of these overlays (by superblock), which all are owed an error.

    `skip`: processes that need no look. Returns those of which not all could be held, with the reason.
    """
    missed: dict[Overlay, str] = {}
    accounts = [(each, each.account) for each in overlays.values()]  # `retire` takes it away meanwhile
    owed = {each: account.owed() for each, account in accounts if account is not None}
    try:
        for overlay, tid, fd in _descriptors(overlays, table, skip):
            why = _hold(overlay, tid, fd, table)
            if why:
                missed[overlay] = why
    except OSError as error:
        missed = dict.fromkeys(overlays.values(), error.strerror or "not all was looked at")
    for overlay, newest in owed.items():
        with overlay.lock:
            if overlay.account is not None:
                overlay.incomplete |= overlay in missed
                if newest is not None:  # not one that was recorded meanwhile: it has a walk of its own
                    overlay.account.propagated(newest)
                overlay.save()
    return missed


def _hold(overlay: Overlay, tid: int, fd: int, table: Table) -> str:
    """Hold a description, if it is not held yet, as one that is owed an error; why it could not be, or nothing."""
    try:
        with overlay.lock:
            if overlay.account is None or overlay.held.find(tid, fd)[1]:
                return ""
            held = overlay.hold(tid, fd, partial(table.is_on, overlay.device, tid), _BEFORE)
        return "" if held else "too many open files"
    except OSError as error:
        return "" if error.errno in _GONE else str(error)


def let_go_of_closed_ones(overlays: dict[int, Overlay], table: Table, skip: set[int]) -> None:
    """Walk the machine and let go of descriptions of these overlays that nobody else has open any more.

    Where not all were known that are owed an error, those that are open now are held, if there is room for all. None is
    let go, and it is as it was, if the walk does not come to its end.
    """
    seen: dict[int, set[int]] = {device: set() for device in overlays}
    accounts = {device: each.account for device, each in overlays.items() if each.incomplete}  # `retire` takes it away
    reached = {device: account.reached for device, account in accounts.items() if account is not None}
    try:
        for overlay, tid, fd in _descriptors(overlays, table, skip):
            if overlay.device in reached and _hold(overlay, tid, fd, table):
                del reached[overlay.device]
            with contextlib.suppress(OSError), overlay.lock:
                at, held = overlay.held.find(tid, fd)
                if held:
                    seen[overlay.device].add(overlay.held.entries[at][0])
    except OSError:  # what is held may be where the walk did not come
        return
    for device, overlay in overlays.items():
        with overlay.lock:
            overlay.prune(seen[device])
            if overlay.account is not None and overlay.account.reached == reached.get(device):
                overlay.incomplete = False
                overlay.save()


def _descriptors(overlays: dict[int, Overlay], table: Table, skip: set[int]) -> Iterator[tuple[Overlay, int, int]]:
    """Descriptors on these overlays. OSError: TimeoutError, or where there are no descriptors left to look with."""
    walk = Walk()
    for tid, fd, place in descriptions.walk(skip):
        try:
            overlay = overlays.get(table.device_of(place, tid, walk))
        except OSError as error:
            if error.errno in FULL:
                raise
            continue
        if overlay is not None:
            yield overlay, tid, fd
