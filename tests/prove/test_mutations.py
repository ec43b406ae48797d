"""Each rule of the ledger is deleted or turned round: some claim must notice."""

from collections.abc import Callable, Iterator

import pytest

from overt import errseq, ledger
from overt.ledger import Account, Description, Ledger
from overt.prove.checker import Checker
from overt.prove.claims import CLAIMS
from overt.prove.design import EIO, Answer, Design
from overt.prove.designs.guard import Guard
from overt.prove.designs.overt_mount import OvertMount
from overt.prove.designs.watching import account_of, keep
from overt.prove.scope import SCOPES, Bound, mixes
from overt.prove.world import UPPER

from .test_matrix import UNSOLVED_BY

pytestmark = pytest.mark.timeout(180)

SMALL = (Bound(1, 1, 1), Bound(1, 1, 2), Bound(1, 2, 1), Bound(2, 1, 1), Bound(1, 2, 2), Bound(2, 2, 2))


def broken(design: Design, bounds: tuple[Bound, ...] = SMALL) -> Iterator[int]:
    """Use cases that a design breaks, and does not without any mutation; smaller worlds first."""
    for bound in bounds:
        for scope in SCOPES.values():
            for kinds in mixes(bound.overlays):
                found = Checker(design, scope, bound, kinds).run().violations
                yield from (number for number, _ in found if number not in UNSOLVED_BY[design.name])


class Plain(OvertMount):
    """The ledger alone, which keeps the descriptions too, as it says of itself.

    The mount leaves them to the kernel's errseq, and the guard asks in such an order that some rules are there twice.
    """

    def open(self, upper, overlay, file):
        super().open(upper, overlay, file)
        account = account_of(upper, overlay)
        file.f_sb_err = account.open().since
        keep(overlay, account)

    def syncfs(self, upper, overlay, file):
        failed = 0 if overlay.volatile else self.flush_and_look(upper)
        self.look(upper)
        account = account_of(upper, overlay)
        description = Description(file.f_sb_err)
        code = account.syncfs(description)
        file.f_sb_err = description.since
        keep(overlay, account)
        return Answer(failed or code, not overlay.volatile)

    def remount(self, upper, overlay, *, read_only):
        return Answer(EIO)


def broken_by_any(bounds: tuple[Bound, ...]) -> Iterator[int]:
    """With the ledger as it is now."""
    for bound in bounds:
        for design in (Plain(), OvertMount(), Guard()):
            yield from broken(design, (bound,))


# Of the ledger. A mutation is a function that gets the original and returns what takes its place.


def opening(**values: Callable[[Ledger], int]) -> Callable[[object], object]:
    """An account that begins with other numbers."""

    def mutate(original: Callable[..., Account]) -> Callable[..., Account]:
        def open_account(self: Ledger, name: str, *, volatile: bool = False) -> Account:
            account = original(self, name, volatile=volatile)
            for field, value in values.items():
                setattr(account, field, value(self))
            return account

        return open_account

    return mutate


def owed_if(rule: Callable[[Account, ledger.UpperError], bool]) -> Callable[[object], object]:
    """Another answer to the question whether the newest error is owed."""

    def mutate(_: object) -> object:
        def owed(self: Account) -> ledger.UpperError | None:
            newest = self.ledger.newest
            return newest if newest is not None and rule(self, newest) else None

        return owed

    return mutate


def propagating(
    reached: Callable[[int], int] = lambda number: number,
    cursor: Callable[[int, int], int] = errseq.set_error,
) -> Callable[[object], object]:
    """Another way of carrying an error over to the overlay's cursor."""

    def mutate(_: object) -> object:
        def propagated(self: Account, error: ledger.UpperError) -> None:
            if error.number > self.reached:
                self.reached = reached(error.number)
                self.cursor = cursor(self.cursor, error.errno)

        return propagated

    return mutate


def asking(tell: Callable[[Account, ledger.Description], int]) -> Callable[[object], object]:
    """Another answer of an ordinary overlay to syncfs."""

    def mutate(original: Callable[[Account, ledger.Description], int]) -> object:
        def syncfs(self: Account, description: ledger.Description) -> int:
            return original(self, description) if self.volatile else tell(self, description)

        return syncfs

    return mutate


def _without_settling(self: Account, description: ledger.Description) -> int:
    code, self.cursor, description.since = errseq.check_and_advance(self.cursor, description.since)
    return code


def _without_advancing(self: Account, description: ledger.Description) -> int:
    self._settle()
    code, self.cursor, _ = errseq.check_and_advance(self.cursor, description.since)
    return code


def _without_marking(self: Account, description: ledger.Description) -> int:
    self._settle()
    code, _, description.since = errseq.check_and_advance(self.cursor, description.since)
    return code


def _marking_what_was_not_told(self: Account, description: ledger.Description) -> int:
    self._settle()
    code, self.cursor, description.since = errseq.check_and_advance(self.cursor, description.since)
    self.cursor |= errseq.SEEN if self.cursor else 0
    return code if code and self.reached == self.ledger.count and self.reached < 2 else 0


def _once_for_all(self: Account, description: ledger.Description) -> int:
    self._settle()
    told = self.cursor & errseq.SEEN
    code, self.cursor, description.since = errseq.check_and_advance(self.cursor, description.since)
    return 0 if told else code


def _before_settling(self: Account, description: ledger.Description) -> int:
    code = errseq.check(self.cursor, description.since)
    self._settle()
    _, self.cursor, description.since = errseq.check_and_advance(self.cursor, description.since)
    return code


def _for_ever(self: Account, description: ledger.Description) -> int:
    return EIO if self.count else 0


def _at_open(since: Callable[[Account], int]) -> Callable[[object], object]:
    def mutate(_: object) -> object:
        def open_description(self: Account) -> ledger.Description:
            self._settle()
            return ledger.Description(since(self))

        return open_description

    return mutate


def sticky_if(rule: Callable[[Account], bool]) -> Callable[[object], object]:
    return lambda _: lambda self: EIO if self.volatile and rule(self) else 0


def always(value: object) -> Callable[[object], object]:
    return lambda _: value


def _overwriting(self: Ledger, errno: int, when: float, source: str, *, taken: bool = False) -> ledger.UpperError:
    error = ledger.UpperError(1, errno, when, source, taken)
    self.errors[:] = [error]
    return error


def _volatile_by_cursor(self: Account, description: ledger.Description) -> int:
    for error in [self.owed()]:
        if error is not None:
            self.propagated(error)
    code, self.cursor, description.since = errseq.check_and_advance(self.cursor, description.since)
    return code


MUTATIONS: dict[str, tuple[type, str, Callable[[object], object]]] = {
    "an account begins with the first error": (
        Ledger, "open_account", opening(mounted_at=lambda _: 0, reached=lambda _: 0),
    ),
    "what was there at the mount is owed": (Ledger, "open_account", opening(reached=lambda _: 0)),
    "what was there at the mount is sticky": (Ledger, "open_account", opening(mounted_at=lambda _: 0)),
    "the first error since is not counted": (Ledger, "open_account", opening(mounted_at=lambda one: one.count + 1)),
    "the first error since is not owed": (Ledger, "open_account", opening(reached=lambda one: one.count + 1)),
    "nothing is sticky": (Account, "sticky", always(lambda self: 0)),
    "sticky from the second error on": (Account, "sticky", sticky_if(lambda one: one.count > 1)),
    "sticky for one error only": (Account, "sticky", sticky_if(lambda one: one.count == 1)),
    "sticky until the mount's number": (Account, "sticky", sticky_if(lambda one: one.ledger.count < one.mounted_at)),
    "sticky whatever was before": (Account, "sticky", sticky_if(lambda one: one.ledger.count > 0)),
    "errors are counted from the beginning": (Account, "count", always(property(lambda self: self.ledger.count))),
    "nothing is owed": (Account, "owed", owed_if(lambda one, newest: False)),
    "owed only if nothing was carried over before": (Account, "owed", owed_if(lambda one, newest: one.cursor == 0)),
    "owed only if it is the next": (Account, "owed", owed_if(lambda one, newest: newest.number == one.reached + 2)),
    "owed from the second error on": (Account, "owed", owed_if(lambda one, newest: newest.number > one.reached + 1)),
    "carried over again and again": (Account, "propagated", propagating(reached=lambda number: number - 1)),
    "carried over, and the next one with it": (Account, "propagated", propagating(reached=lambda number: number + 1)),
    "noted, and not carried over": (Account, "propagated", propagating(cursor=lambda cursor, errno: cursor)),
    "carried over without counting": (Account, "propagated", propagating(cursor=lambda cursor, errno: errno)),
    "carried over as seen": (Account, "propagated", propagating(cursor=lambda _, code: code | errseq.SEEN)),
    "a new description has been told": (Account, "open", _at_open(lambda one: one.cursor)),
    "a new description has been told nothing": (Account, "open", _at_open(lambda one: 0)),
    "syncfs does not carry over": (Account, "syncfs", asking(_without_settling)),
    "syncfs looks before it carries over": (Account, "syncfs", asking(_before_settling)),
    "syncfs does not move the description": (Account, "syncfs", asking(_without_advancing)),
    "syncfs does not mark the cursor": (Account, "syncfs", asking(_without_marking)),
    "syncfs marks what it does not tell": (Account, "syncfs", asking(_marking_what_was_not_told)),
    "syncfs tells one description of all": (Account, "syncfs", asking(_once_for_all)),
    "syncfs of an ordinary overlay is sticky": (Account, "syncfs", asking(_for_ever)),
    "syncfs of a volatile overlay goes by the cursor": (Account, "syncfs", always(_volatile_by_cursor)),
    "an answer is counted and swallowed": (Account, "tell", always(lambda self, code: 0)),
    "every error has the same number": (Ledger, "record", always(_overwriting)),
    "the newest error is the oldest": (Ledger, "newest", always(property(lambda self: next(iter(self.errors), None)))),
    "one error is all that is counted": (Ledger, "count", always(property(lambda self: min(1, len(self.errors))))),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_of_the_ledger_breaks_a_claim(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, attribute, mutate = MUTATIONS[name]
    monkeypatch.setattr(where, attribute, mutate(getattr(where, attribute)))
    assert next(broken_by_any(SMALL), None) is not None


# Of what is around it: the server's own part, and the kernel's. Together they break every claim that overt keeps.


class OneDescriptor(OvertMount):
    """fsync goes through one descriptor for all who have the file open."""

    def fsync(self, upper, overlay, file):
        if not overlay.volatile and overlay.inode.place == UPPER:
            return super().fsync(upper, overlay, next(file for file in overlay.files if file.is_open))
        return super().fsync(upper, overlay, file)


class FsyncForEver(OvertMount):
    """fsync does not move the descriptor."""

    def advance_file(self, overlay, file):
        return self.errseq.check(overlay.inode.wb_err, file.f_wb_err)


class NotReopened(OvertMount):
    """Descriptors stay what they were at the copy-up."""

    def copied_up(self, overlay):
        pass


class KnowsWhatItOpens(OvertMount):
    """An open file counts from now, whoever was told."""

    class errseq:
        COUNTER = errseq.COUNTER
        set_error, check = staticmethod(errseq.set_error), staticmethod(errseq.check)
        check_and_advance = staticmethod(errseq.check_and_advance)

        @staticmethod
        def sample(cursor):
            return cursor


class FlushesVolatile(OvertMount):
    """A volatile mount flushes as an ordinary one does."""

    def syncfs(self, upper, overlay, file):
        return super().syncfs(upper, overlay, file)._replace(flushed=True)


class FlushesVolatileDirectories(OvertMount):
    """fsync of a directory reaches the upper's, volatile or not."""

    def fsync_dir(self, upper, overlay):
        return super().fsync_dir(upper, overlay)._replace(flushed=True)


class FlushesVolatileRemounts(OvertMount):
    """A volatile mount that becomes read-only is flushed."""

    def remount(self, upper, overlay, *, read_only):
        return super().remount(upper, overlay, read_only=read_only)._replace(flushed=True)


class FlushesNothing(OvertMount):
    """An ordinary mount does not flush."""

    def syncfs(self, upper, overlay, file):
        return super().syncfs(upper, overlay, file)._replace(flushed=False)


class ForgetsTheAbort(OvertMount):
    """An aborted journal is told of as the kernel tells: once."""

    def syncfs(self, upper, overlay, file):
        failed = 0 if overlay.volatile else self.flush(upper)
        if upper.state:
            return Answer(failed, True)
        return super().syncfs(upper, overlay, file)


class AsksTheLower(OvertMount):
    """fsync of a file that is not in the upper fails."""

    def fsync(self, upper, overlay, file):
        return super().fsync(upper, overlay, file) if overlay.inode.place == UPPER else Answer(EIO)


class TakesFromTheHost(OvertMount):
    """The upper's cursor is consumed."""

    def look(self, upper):
        _, upper.s_wb_err, _ = errseq.check_and_advance(upper.s_wb_err, 0)
        super().look(upper)


class SeesTheUnseen(OvertMount):
    """It looks at the upper's cursor, and sees what nobody has seen."""

    def look(self, upper):
        super().look(upper)
        if upper.s_wb_err & errseq.SEEN:
            upper.recorded = 0


class SharesOneLook(OvertMount):
    """Whoever looks first sees the error, and it is his alone."""

    def syncfs(self, upper, overlay, file):
        answer = super().syncfs(upper, overlay, file)
        if answer.errno and not overlay.volatile:
            upper.recorded = max(0, upper.recorded - 1)
        return answer


class SilentUmount(OvertMount):
    """umount says nothing."""

    def umount(self, upper, overlay):
        return super().umount(upper, overlay)._replace(errno=0)


class LoudUmount(OvertMount):
    """umount says that there was an error, whether there was one or not."""

    def umount(self, upper, overlay):
        return super().umount(upper, overlay)._replace(errno=EIO)


class CopiesUnflushed(OvertMount):
    """A copy gets its name before it is on the disk."""

    def flushes_copies(self, overlay):
        return False


class DirectoriesByItself(OvertMount):
    """fsync of a directory does not reach the upper's."""

    def fsync_dir(self, upper, overlay):
        return super().fsync_dir(upper, overlay) if overlay.volatile else Answer()


class DirectoriesForgotten(OvertMount):
    """A volatile mount says 0 for a directory."""

    def fsync_dir(self, upper, overlay):
        return Answer() if overlay.volatile else super().fsync_dir(upper, overlay)


class MsyncUnheard(OvertMount):
    """msync flushes, and what that comes to is dropped."""

    def msync(self, upper, overlay, file):
        return super().msync(upper, overlay, file)._replace(errno=0)


class MsyncForEver(OvertMount):
    """msync does not move its open file."""

    def msync(self, upper, overlay, file):
        return Answer(self.errseq.check(overlay.inode.wb_err, file.f_map_err), True)


class HoldsNobody(Guard):
    """The agent does not look who is open before it tells the first."""

    def hold_open_ones(self, upper, overlay):
        pass


class HoldsForEver(Guard):
    """Nobody who was told is let go."""

    def syncfs(self, upper, overlay, file):
        held, since = file.held, file.f_sb_err
        answer = super().syncfs(upper, overlay, file)
        file.held, file.f_sb_err = held, since
        return answer


class NotReached(OvertMount):
    """Nothing gets to the cursor of a superblock that becomes read-only."""

    def remount(self, upper, overlay, *, read_only):
        reached, cursor = overlay.reached, overlay.s_wb_err
        answer = super().remount(upper, overlay, read_only=read_only)
        overlay.reached, overlay.s_wb_err = reached, cursor
        return answer


AROUND = [
    OneDescriptor, FsyncForEver, NotReopened, KnowsWhatItOpens, FlushesVolatile, FlushesVolatileDirectories,
    FlushesVolatileRemounts, FlushesNothing, ForgetsTheAbort, AsksTheLower, TakesFromTheHost, SeesTheUnseen,
    SharesOneLook, SilentUmount, LoudUmount, CopiesUnflushed, DirectoriesByItself, DirectoriesForgotten, MsyncUnheard,
    MsyncForEver, HoldsNobody, HoldsForEver, NotReached,
]  # fmt: skip


@pytest.mark.parametrize("mutant", AROUND)
def test_a_mutation_around_the_ledger_breaks_a_claim(mutant: type[Design]) -> None:
    assert next(broken(mutant()), None) is not None


def broken_by_mutations() -> Iterator[int]:
    """In worlds as small as will do."""
    for mutant in AROUND:
        yield from broken(mutant(), (Bound(1, 1, 1), Bound(1, 2, 1)))
    yield from broken(SharesOneLook(), (Bound(2, 1, 1),))  # U12 is about two
    for where, attribute, mutate in MUTATIONS.values():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, attribute, mutate(getattr(where, attribute)))
            yield from broken(Plain(), (Bound(1, 1, 2),))  # and U8 about two errors


def test_every_claim_is_broken_by_some_mutation() -> None:
    """But those that overt does not keep."""
    left = set(CLAIMS)
    for number in broken_by_mutations():
        left.discard(number)
        if left == UNSOLVED_BY["overt"]:
            return
    raise AssertionError(left)
