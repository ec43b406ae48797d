"""What overt's mount and the guard have in common: `overt.upper`, and an account of the real `overt.ledger`."""

from overt.ledger import Account, Ledger
from overt.prove.design import EIO, Design
from overt.prove.world import ALIVE, Party, Upper


class Watching(Design):
    """The eyes (two kernel overlays and the tracepoint) see whether an error was recorded since they looked last; the
    ledger numbers it; each overlay has an account. The state of all three is kept in the model's pieces, and for each
    call the real ledger and account are built from it and asked."""

    def attach(self, upper: Upper, overlay: Party) -> None:
        """Upper.attach: errors count from now."""
        if upper.mounts:
            self.look(upper)
        elif self.errseq.check(upper.s_wb_err, self.errseq.sample(upper.s_wb_err)):
            self.meet_standing(upper)
        account = _ledger(upper).open_account("", volatile=overlay.volatile)
        upper.mounts += 1
        overlay.mounted_at = account.mounted_at
        keep(overlay, account)

    def detach(self, upper: Upper) -> None:
        """Upper.detach: with the last overlay the ledger goes."""
        upper.mounts -= 1
        if upper.mounts == 0:
            upper.recorded, upper.unread = 0, False

    def struck(self, upper: Upper) -> None:
        if upper.mounts:
            upper.unread = True

    def look(self, upper: Upper) -> None:
        """Upper.check: what the eyes have not seen yet is one error."""
        if upper.unread:
            upper.unread = False
            upper.recorded += 1

    def meet_standing(self, upper: Upper) -> None:
        """An error that nobody has seen stands at the first mount: with the tracepoint it may go on standing."""
        upper.recorded += 1

    def flush_and_look(self, upper: Upper) -> int:
        """Upper.flush. On an upper that has died every flush fails (overt/upper/health.py)."""
        failed = 0 if upper.state == ALIVE else EIO
        self.flush(upper)
        self.look(upper)
        return failed


def account_of(upper: Upper, overlay: Party) -> Account:
    """The overlay's account, in a ledger that has recorded what this upper's has."""
    account = _ledger(upper).open_account("", volatile=overlay.volatile)
    account.mounted_at, account.reached, account.cursor = overlay.mounted_at, overlay.reached, overlay.s_wb_err
    return account


def keep(overlay: Party, account: Account) -> None:
    """Take over what a call has changed in the account."""
    overlay.reached, overlay.s_wb_err = account.reached, account.cursor


def _ledger(upper: Upper) -> Ledger:
    ledger = Ledger()
    for _ in range(upper.recorded):
        ledger.record(EIO, 0.0, "probe")
    return ledger
