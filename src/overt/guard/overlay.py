"""One overlay that is guarded: its account in the upper's ledger, and who in it is yet to be told.

All that decides what a syncfs(2) is answered is in `judge`. It asks the ledger, and keeps for it what the kernel would
keep in each open file (f_sb_err): the position of each description that was open when an error became known.
"""

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from overt.guard import descriptions, places
from overt.guard.container import Container
from overt.guard.descriptions import Held
from overt.guard.places import Place
from overt.guard.slots import Notification
from overt.guard.store import Entry, Keeper
from overt.guard.table import Mounted, Table, Walk
from overt.ledger import Account, Description, UpperError
from overt.upper import Upper, Uppers

Send = Callable[[int], bool]

_CARRIED = ("mounted_at", "reached", "cursor", "told", "heard", "spared", "left_out")
"""what the next worker needs of an account"""
_numbers = itertools.count(1)


class Overlay:
    """See above. `door` is held while it is opened and closed, `lock` while somebody is told; never across a flush."""

    def __init__(self, mounted: Mounted, keeper: Keeper) -> None:
        self.device = mounted.device
        self.mounted = mounted
        self.name = os.fsdecode(mounted.upperdir)
        self.users: set[int] = set()
        """numbers of the listeners whose containers have it"""
        self.callers: list[tuple[Container, int, Notification]] = []
        """who waits for it to be opened; the agent's"""
        self.account: Account | None = None
        self.upper: Upper | None = None
        self.held = Held()
        self.incomplete = False
        """whether a walk for its open descriptions was broken off: some that are owed an error may not be in `held`"""
        self.lock = threading.Lock()
        self.door = threading.Lock()
        self._closed = False
        self._keeper = keeper
        self._place: Place | None = None

    def open(self, uppers: Uppers, pids: list[int], uuid: bytes = b"") -> None:
        """Open an account: errors count from now. Does nothing if there is one. OSError if the upper is not found.

        `pids` and `uuid`: see `places.find`.
        """
        with self.door:
            if self._closed:
                raise ProcessLookupError(errno.ESRCH, "its last container has ended")
            if self.account is None:
                self._attach(uppers, places.find(self.mounted, pids, uuid))
                with self.lock:
                    self.save()

    def restore(self, uppers: Uppers, entry: Entry, errors: Mapping[int, list[UpperError]]) -> None:
        """Go on with what another worker has left; `errors` of uppers' ledgers, by superblock."""
        self._attach(uppers, Place(entry.fds[0], entry.fds[1], entry.value["scratch"], entry.fds[2]), errors)
        account = self.account
        assert account is not None
        for name, value in entry.value["account"].items():
            setattr(account, name, value)

    def _attach(self, uppers: Uppers, place: Place, errors: Mapping[int, list[UpperError]] | None = None) -> None:
        try:
            upper = uppers.get(place.beside, place.scratch)
            if errors and not upper.ledger.errors:
                upper.ledger.errors.extend(errors.get(upper.s_dev, ()))
            account = upper.attach(self.name, volatile=False)
        except BaseException:
            place.close()
            raise
        self.upper, self._place = upper, place
        self.account = account  # from now on calls are answered with it

    def save(self) -> None:
        """Have the supervisor keep the account. The caller has `lock`: what is kept last is the newest."""
        account, place = self.account, self._place
        assert account is not None and place is not None
        value = {
            "mounted": [self.device, *map(os.fsdecode, self.mounted[1:4]), self.mounted.volatile],
            "scratch": place.name,
            "account": {name: getattr(account, name) for name in _CARRIED},
        }  # fmt: skip
        self._keeper.put(f"overlay/{self.device}", value, [place.beside, place.scratch, place.upper])

    def close(self) -> None:
        """Let go of the upper, and of everybody who is yet to be told."""
        with self.door, self.lock:
            self._closed = True
            account, self.account = self.account, None
            if account is None or self.upper is None or self._place is None:
                return
            while self.held.entries:
                self._keeper.drop(self.held.take(-1))
            self._keeper.drop(f"overlay/{self.device}")
            with contextlib.ExitStack() as stack:
                stack.callback(self._place.close)
                self.upper.detach(account)

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
        for name in self.held.prune(seen):
            self._keeper.drop(name)

    def hold_again(self, fd: int, since: int, name: str) -> None:
        """Hold a description as another worker did."""
        if not self.held.add(fd, Description(since), name):
            os.close(fd)

    def hold(self, fd: int) -> None:
        """Hold a description by our own descriptor `fd`, unless it is held already; it is owed what is not told yet.

        The caller has `lock`.
        """
        assert self.account is not None
        description = self.account.open()
        name = f"owed/{self.device}/{os.getpid()}/{next(_numbers)}"
        if self.held.add(fd, description, name):
            self._keeper.put(name, description.since, [fd])
        else:
            os.close(fd)

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
            description = self.held.entries[at][1] if held else account.open()
            before = (account.cursor, account.told, account.heard, description.since)
            code = account.syncfs(description)
            sent = send(code or (failure.errno or errno.EIO if failure else 0))
            if not code:
                return True
            if not sent:
                account.cursor, account.told, account.heard, description.since = before
                return True
            self.save()
            if held:
                self._keeper.drop(self.held.take(at))
            return True

    def _find(self, tid: int, fd: int) -> tuple[int, bool]:
        if not self.held.entries:
            return 0, False
        try:
            return self.held.find(tid, fd)
        except OSError:  # closed by another thread meanwhile: it counts as a new one
            return 0, False


def hold_open_ones(overlays: dict[int, Overlay], table: Table, skip: set[int]) -> bool:
    """Walk the machine and hold each open description of these overlays (by superblock), which all are owed an error.

    `skip`: processes that need no look. False if the walk took too long, and not all were seen: they are `incomplete`.
    """
    complete = True
    try:
        for overlay, tid, fd in _descriptors(overlays, table, skip):
            with contextlib.suppress(OSError), overlay.lock:  # closed, or its process ended, while we looked
                if overlay.account is not None and not overlay.held.find(tid, fd)[1]:
                    overlay.hold(descriptions.borrow(tid, fd, partial(table.is_on, overlay.device, tid)))
    except TimeoutError:
        complete = False
    for overlay in overlays.values():
        with overlay.lock:
            if overlay.account is not None:
                overlay.incomplete |= not complete
                overlay.account.open()  # settles: the walk is not repeated for this error
                overlay.save()
    return complete


def let_go_of_closed_ones(overlays: dict[int, Overlay], table: Table, skip: set[int]) -> None:
    """Walk the machine and let go of descriptions of these overlays that nobody else has open any more.

    None is let go if the walk takes too long.
    """
    seen: dict[int, set[int]] = {device: set() for device in overlays}
    try:
        for overlay, tid, fd in _descriptors(overlays, table, skip):
            with contextlib.suppress(OSError), overlay.lock:
                at, held = overlay.held.find(tid, fd)
                if held:
                    seen[overlay.device].add(overlay.held.entries[at][0])
    except TimeoutError:  # they may be in a table that was not come to
        return
    for device, overlay in overlays.items():
        with overlay.lock:
            overlay.prune(seen[device])


def _descriptors(overlays: dict[int, Overlay], table: Table, skip: set[int]) -> Iterator[tuple[Overlay, int, int]]:
    walk = Walk()
    for tid, fd, place in descriptions.walk(skip):
        with contextlib.suppress(OSError):
            overlay = overlays.get(table.device_of(place, tid, walk))
            if overlay is not None:
                yield overlay, tid, fd
