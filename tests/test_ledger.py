"""The ledger: who has been told of what. Stated for single cases, and as a machine checked against a plain account."""

import errno

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, rule

from overt.ledger import Account, Description, Ledger

EIO, ENOSPC = errno.EIO, errno.ENOSPC


def record(ledger: Ledger, code: int = EIO) -> None:
    ledger.record(code, 0.0, "probe")


def test_an_error_is_told_in_each_of_a_thousand_overlays_once() -> None:
    ledger = Ledger()
    accounts = [ledger.open_account(str(number)) for number in range(1000)]
    record(ledger)
    fresh = [(account, account.open()) for account in accounts]
    assert [account.syncfs(fd) for account, fd in fresh] == [EIO] * 1000
    assert [account.syncfs(fd) for account, fd in fresh] == [0] * 1000
    assert [account.syncfs(account.open()) for account in accounts] == [0] * 1000
    assert sum(account.told for account in accounts) == 1000


def test_each_description_that_was_open_is_told_once_even_after_another_was() -> None:
    account = Ledger().open_account("a")
    old = [account.open() for _ in range(3)]
    record(account.ledger)
    assert [account.syncfs(fd) for fd in old] == [EIO] * 3
    assert [account.syncfs(fd) for fd in old] == [0] * 3


def test_a_description_opened_after_the_error_is_told_only_while_nobody_was() -> None:
    account = Ledger().open_account("a")
    record(account.ledger)
    second, third = account.open(), account.open()
    assert account.syncfs(second) == EIO
    assert account.syncfs(account.open()) == 0
    assert account.syncfs(third) == EIO  # it was opened before anybody was told


def test_an_error_from_before_the_mount_is_not_told() -> None:
    ledger = Ledger()
    record(ledger)
    ordinary, volatile = ledger.open_account("o"), ledger.open_account("v", volatile=True)
    assert [account.syncfs(account.open()) for account in (ordinary, volatile)] == [0, 0]
    assert ordinary.errors() == volatile.errors() == []
    assert ordinary.owed() is None


def test_a_volatile_overlay_answers_with_eio_for_ever_whatever_the_errno_was() -> None:
    ledger = Ledger()
    account = ledger.open_account("v", volatile=True)
    old = account.open()
    assert account.syncfs(old) == 0
    record(ledger, ENOSPC)
    assert [account.syncfs(fd) for fd in (old, account.open(), old, account.open())] == [EIO] * 4
    assert account.sticky() == EIO


def test_an_ordinary_overlay_is_never_sticky() -> None:
    account = Ledger().open_account("o")
    record(account.ledger)
    assert account.sticky() == 0


def test_errors_that_nobody_asked_about_are_told_as_one_with_the_newest_errno() -> None:
    account = Ledger().open_account("o")
    fd = account.open()
    record(account.ledger, EIO)
    record(account.ledger, ENOSPC)
    assert [account.syncfs(fd), account.syncfs(fd)] == [ENOSPC, 0]


def test_what_is_owed_is_the_newest_error_and_propagating_settles_it() -> None:
    account = Ledger().open_account("o")
    record(account.ledger, EIO)
    record(account.ledger, ENOSPC)
    owed = account.owed()
    assert owed is not None
    assert (owed.number, owed.errno) == (2, ENOSPC)
    account.propagated(owed)
    assert account.owed() is None
    before = account.cursor
    account.propagated(account.ledger.errors[0])  # settled long ago: changes nothing
    assert (account.owed(), account.cursor) == (None, before)


def test_who_is_spared_an_error_is_told_of_the_one_before_and_the_one_after() -> None:
    ledger = Ledger()
    owner, other = ledger.open_account("owner"), ledger.open_account("other")
    old = [other.open() for _ in range(3)]
    record(ledger)
    assert other.syncfs(old[0]) == EIO
    record(ledger)
    newest = ledger.newest
    assert newest is not None
    assert (other.count, other.untold) == (2, True)
    other.spare(newest)
    assert (other.count, other.untold, owner.count, owner.untold) == (1, False, 2, True)
    assert [other.syncfs(old[0]), other.syncfs(old[1]), other.syncfs(other.open())] == [0, EIO, 0]
    assert (owner.syncfs(owner.open()), ledger.told(newest)) == (EIO, ["owner"])
    record(ledger)
    assert [other.syncfs(fd) for fd in old] == [EIO] * 3
    other.spare(newest)  # too late for that one, and of no consequence
    assert other.reached == 3


def test_an_overlay_in_which_nobody_was_told_of_the_newest_error_is_known() -> None:
    account = Ledger().open_account("o")
    found = [account.untold]
    for _ in range(2):
        record(account.ledger)
        found.append(account.untold)
        late = account.open()  # settles, and tells nobody
        found.append(account.untold)
        account.syncfs(late)
        found.append(account.untold)
    assert found == [False, True, True, False, True, True, False]
    volatile = account.ledger.open_account("v", volatile=True)
    found = [volatile.untold]
    record(account.ledger)
    found.append(volatile.untold)
    volatile.syncfs(volatile.open())
    assert [*found, volatile.untold] == [False, True, False]


def test_an_error_can_be_marked_as_taken_afterwards() -> None:
    account = Ledger().open_account("o")
    record(account.ledger)
    marked = account.ledger.mark_taken()
    assert marked.taken
    assert account.ledger.errors == [marked]
    assert account.owed() is marked


def test_of_errors_without_end_the_newest_are_kept_and_all_are_counted() -> None:
    ledger = Ledger()
    early, sticky = ledger.open_account("e"), ledger.open_account("v", volatile=True)
    for _ in range(1000):
        record(ledger)
    late = ledger.open_account("l")
    assert [error.number for error in ledger.errors] == [*range(981, 1001)]
    assert [account.count for account in (early, sticky, late)] == [1000, 1000, 0]
    assert (late.before, late.owed(), sticky.sticky()) == (ledger.newest, None, EIO)
    record(ledger, ENOSPC)
    assert (late.count, late.errors()) == (1, [ledger.newest])
    assert [account.syncfs(account.open()) for account in (early, sticky, late)] == [ENOSPC, EIO, ENOSPC]


def test_a_closed_account_is_forgotten() -> None:
    ledger = Ledger()
    kept, closed = ledger.open_account("kept"), ledger.open_account("closed")
    ledger.close_account(closed)
    assert ledger.accounts == [kept]


class Overlays(RuleBasedStateMachine):
    """Any history of mounts, opens, errors and questions, against sets of who is still to be told.

    The plain account: for each error, each description that was open, or is opened before anybody in its overlay was
    told, is to be told of it; an answer covers everything the description was still to be told.
    """

    accounts = Bundle("accounts")
    opened = Bundle("opened")

    def __init__(self, ledger: Ledger | None = None) -> None:
        super().__init__()
        self.ledger = ledger or Ledger()
        self.waiting: dict[Account, bool] = {}  # an error was recorded and nobody of this overlay was told yet
        self.due: dict[Description, int] = {}
        self.of: dict[Description, Account] = {}
        self.newest: dict[Account, int] = {}

    @rule(target=accounts, volatile=st.booleans())
    def mount(self, volatile: bool) -> Account:
        account = self.ledger.open_account("", volatile=volatile)
        self.waiting[account] = False
        self.newest[account] = 0
        return account

    @rule(target=opened, account=accounts)
    def open(self, account: Account) -> Description:
        fd = account.open()
        self.of[fd] = account
        self.due[fd] = self.newest[account] if self.waiting[account] else 0
        return fd

    @rule(code=st.sampled_from([EIO, ENOSPC]))
    def error(self, code: int) -> None:
        record(self.ledger, code)
        for account in self.waiting:
            self.waiting[account] = True
            self.newest[account] = code
        for fd in self.due:
            self.due[fd] = code

    @rule(fd=opened)
    def ask(self, fd: Description) -> None:
        account = self.of[fd]
        if account.volatile:
            assert account.syncfs(fd) == (EIO if self.newest[account] else 0)
            return
        assert account.syncfs(fd) == self.due[fd]
        if self.due[fd]:
            self.waiting[account] = False
        self.due[fd] = 0


class ForgetfulOverlays(Overlays):
    """The same, and it must be the same, where no error but the newest is kept."""

    def __init__(self) -> None:
        super().__init__(Ledger(keep=1))


SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)
Overlays.TestCase.settings = ForgetfulOverlays.TestCase.settings = SETTINGS
TestOverlays = Overlays.TestCase
TestForgetfulOverlays = ForgetfulOverlays.TestCase
