"""Who has been told of what: the errors of one upper, and an account for each overlay on it.

An upper (a superblock) has one error cursor and many overlays. Linux lets an overlay either ignore that cursor or share
it, and sharing a single SEEN bit is why, of a thousand containers, one was told. Here each overlay has a cursor of its
own, to which the upper's errors are propagated; the upper's cursor belongs to the host, who is not robbed by our
reading.

    the upper                     overlay A (ordinary)             overlay B (volatile)
    errors  1  2  3        ----->  cursor: an errseq               sticky: any error after
    (numbered as recorded)         told: each file description      the mount, for ever
                                   once, as errseq has it

The rules that live here and nowhere else (the numbers are those of the contract, docs/contract.md):

2, 4  An error recorded since the mount is told to every description that was open then, once; to a later one, if none
      in this overlay was told yet; and each further error again.
5     Errors recorded before an overlay's mount are not told to it.
8     After an error recorded since its mount, a volatile overlay answers every question with EIO, for ever.

A `Description` is an open file description: what dup(2), fork(2) and SCM_RIGHTS share. For overt's own mounts the
kernel keeps them, because the overlay's superblock carries the propagated errors (`owed`, `propagated`); the guard and
the model, which have no superblock to write to, keep them here (`open`, `syncfs`). The guard does not see who opens, so
that it has to look who is open before it propagates an error, and just that one: another may be recorded at any time
(`sample`, `advance`).

Numbers are for ever and entries are not: a disk that fails for ever makes no end of them. Which errors an overlay has
been told of is a matter of numbers, and all that it can still owe is the newest, so that only the newest are kept.

Nothing here does I/O, reads a clock or takes a lock: whoever owns the upper serialises.
"""

import errno as _errno
from typing import NamedTuple

from overt import errseq

_KEPT = 20
"""errors of an upper, the newest"""


class UpperError(NamedTuple):
    """One error event of an upper."""

    number: int
    """1 for the first that this ledger has recorded."""
    errno: int
    """positive"""
    when: float
    """seconds since the epoch"""
    source: str
    """what told of it: ``probe``, ``trace``, ``cursor``; ``standing`` (it was there before the first overlay was);
    ``flush`` (a flush failed); ``dead`` (a write to the upper failed); ``account`` (known from an overlay's only)"""
    taken: bool
    """whether reading it took it away from the host"""


class Description:
    """A position of one open file description on its overlay's cursor (the kernel's ``f_sb_err``)."""

    __slots__ = ("since",)

    def __init__(self, since: int) -> None:
        self.since = since


class Account:
    """One overlay's share in the errors of its upper. Made by `Ledger.open_account`."""

    __slots__ = (
        "before", "cursor", "heard", "ledger", "left_out", "mounted_at", "name", "reached", "spared", "told",
        "volatile",
    )  # fmt: skip

    def __init__(self, ledger: "Ledger", name: str, *, volatile: bool) -> None:
        self.ledger = ledger
        self.name = name
        self.volatile = volatile
        self.before = ledger.newest
        self.mounted_at = self.reached = ledger.count
        self.heard = ledger.count
        """the number of the newest error of which somebody in this overlay was told; of an earlier one if nobody was"""
        self.cursor = 0
        self.told = 0
        """how many answers carried an error; where the kernel keeps the descriptions, of how many errors somebody was
        told, for it tells the further descriptions by itself (and of several that nobody had asked about, as of one)"""
        self.spared: list[int] = []
        """numbers of the errors that were others' only, the newest"""
        self.left_out = 0
        """how many they were in all"""

    @property
    def count(self) -> int:
        """How many errors of the upper were recorded since this overlay was mounted, but for those of others only."""
        return self.ledger.count - self.mounted_at - self.left_out

    @property
    def untold(self) -> bool:
        """Whether there is an error of which nobody in this overlay was told yet."""
        if self.volatile:
            return bool(self.count) and not self.told
        return self.owed() is not None or (bool(self.cursor) and not self.cursor & errseq.SEEN)

    def errors(self) -> list[UpperError]:
        """Those of them that are kept, oldest first."""
        return [error for error in self.ledger.errors if error.number > self.mounted_at]

    def sticky(self) -> int:
        """The errno that answers every fsync and syncfs of a volatile overlay: EIO after any error, else 0."""
        return _errno.EIO if self.volatile and self.count else 0

    def owed(self) -> UpperError | None:
        """The newest error that the overlay's cursor does not carry yet, or None."""
        newest = self.ledger.newest
        return newest if newest is not None and newest.number > self.reached else None

    def propagated(self, error: UpperError) -> None:
        """Note that the overlay's cursor (the kernel's or this one) now carries all errors up to `error`."""
        if error.number > self.reached:
            self.reached = error.number
            self.cursor = errseq.set_error(self.cursor, error.errno)

    def spare(self, error: UpperError) -> None:
        """Note that the errors owed up to `error` are known to be others' only: nobody in this overlay is told."""
        if error.number > self.reached:
            self.spared = [*self.spared, *range(self.reached + 1, error.number + 1)][-_KEPT:]
            self.left_out += error.number - self.reached
            self.reached = error.number

    def open(self) -> Description:
        """A new open file description of this overlay."""
        self._settle()
        return self.sample()

    def sample(self) -> Description:
        """The same, by the errors that were propagated."""
        return Description(errseq.sample(self.cursor))

    def syncfs(self, description: Description) -> int:
        """The errno (positive, or 0) that syncfs(2) on `description` returns once the upper is flushed and read."""
        if self.volatile:
            return self.tell(self.sticky())
        self._settle()
        return self.advance(description)

    def advance(self, description: Description) -> int:
        """The same of an ordinary overlay, by the errors that were propagated."""
        code, self.cursor, description.since = errseq.check_and_advance(self.cursor, description.since)
        return self.tell(code)

    def tell(self, code: int) -> int:
        """Count an answer that carries an error, which is one to all that the overlay carries; return `code`."""
        if code:
            self.told += 1
            self.heard = self.ledger.count if self.volatile else self.reached
        return code

    def _settle(self) -> None:
        owed = self.owed()
        if owed is not None and not self.volatile:
            self.propagated(owed)


class Ledger:
    """The errors of one upper, in the order in which they were recorded, and the accounts of its overlays."""

    def __init__(self, keep: int = _KEPT) -> None:
        """`keep`: how many errors are kept, 1 at the least."""
        self.errors: list[UpperError] = []
        """the newest"""
        self._keep = keep
        self.accounts: list[Account] = []

    @property
    def newest(self) -> UpperError | None:
        """The error recorded last, or None."""
        return self.errors[-1] if self.errors else None

    @property
    def count(self) -> int:
        """How many errors were recorded."""
        return self.errors[-1].number if self.errors else 0

    @property
    def passed_on(self) -> bool:
        """Whether an ordinary overlay owes nothing: an error that comes now has to be an entry of its own for it."""
        return any(not account.volatile and account.owed() is None for account in self.accounts)

    def record(self, errno: int, when: float, source: str, *, taken: bool = False) -> UpperError:
        """Enter an error of the upper: `errno` positive, `when` in seconds since the epoch; return the entry."""
        error = UpperError(self.count + 1, errno, when, source, taken)
        self.errors.append(error)
        del self.errors[: -self._keep]
        return error

    def mark_taken(self) -> UpperError:
        """Note that the newest error was taken from the host after all; return the new entry."""
        error = self.errors[-1] = self.errors[-1]._replace(taken=True)
        return error

    def open_account(self, name: str, *, volatile: bool = False) -> Account:
        """An account for an overlay mounted now; errors recorded so far are not told to it."""
        account = Account(self, name, volatile=volatile)
        self.accounts.append(account)
        return account

    def close_account(self, account: Account) -> None:
        """Forget an overlay that is gone."""
        self.accounts.remove(account)

    def told(self, error: UpperError) -> list[str]:
        """The names of the overlays, of those still mounted, in which somebody was told of `error`."""
        return [
            account.name
            for account in self.accounts
            if account.mounted_at < error.number
            and error.number not in account.spared
            and account.heard >= error.number
        ]
