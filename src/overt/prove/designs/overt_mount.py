"""overt's mount: its own ledger, `overt.ledger`, asked as the server asks it (overt/server/syncing.py, overt/upper)."""

from overt.ledger import Account, Description, Ledger
from overt.prove.design import EIO, Answer, Design
from overt.prove.world import ALIVE, UPPER, File, Party, Upper


class OvertMount(Design):
    """The eyes (two kernel overlays and the tracepoint) see whether an error was recorded since they looked last; the
    ledger numbers it; each overlay has an account. The state of all three is kept in the model's pieces, and for each
    call the real ledger and account are built from it and asked."""

    name = "overt"
    title = "overt mount"
    source = "overt/ledger.py; overt/server/syncing.py, overt/upper/upper.py"
    served = True

    def mount(self, upper: Upper, overlay: Party) -> int:
        if upper.mounts:
            self.look(upper)
        elif self.errseq.check(upper.s_wb_err, self.errseq.sample(upper.s_wb_err)):
            self.meet_standing(upper)
        account = _ledger(upper).open_account("", volatile=overlay.volatile)
        upper.mounts += 1
        overlay.mounted_at, overlay.reached, overlay.s_wb_err = account.mounted_at, account.reached, account.cursor
        return 0

    def umount(self, upper: Upper, overlay: Party) -> Answer:
        self.look(upper)
        told = EIO if _account(upper, overlay).count else 0
        upper.mounts -= 1
        if upper.mounts == 0:
            upper.recorded, upper.unread = 0, False
        return Answer(told, not overlay.volatile)

    def open(self, upper: Upper, overlay: Party, file: File) -> None:
        account = _account(upper, overlay)
        file.f_sb_err = account.open().since
        _keep(overlay, account)

    def syncfs(self, upper: Upper, overlay: Party, file: File) -> Answer:
        failed = 0
        if not overlay.volatile and upper.state != ALIVE:  # overt/upper/health.py: every flush fails, healed or not
            failed = EIO
            self.flush(upper)
        self.look(upper)
        account = _account(upper, overlay)
        description = Description(file.f_sb_err)
        code = account.syncfs(description)
        file.f_sb_err = description.since
        _keep(overlay, account)
        return Answer(failed or code, not overlay.volatile)

    def fsync(self, upper: Upper, overlay: Party, file: File) -> Answer:
        if overlay.volatile:
            self.look(upper)
            return Answer(_account(upper, overlay).sticky())
        return super().fsync(upper, overlay, file)

    def copied_up(self, overlay: Party) -> None:
        """Every open file of the server's is opened again, on the copy."""
        for file in overlay.files:
            if file.is_open:
                file.real, file.f_wb_err = UPPER, self.errseq.sample(overlay.inode.wb_err)

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


class OvertUntraced(OvertMount):
    """The same without tracefs: where the next error could not be seen, the last is taken from the host."""

    name = "overt-untraced"
    title = "overt mount, no tracefs"

    def look(self, upper: Upper) -> None:
        """Eyes.renew: the probe has fired, and a fresh one needs a cursor without an unseen error.

        It is renewed with the next flush, not with this look; here at once, the sooner being the worse for the host.
        """
        if upper.unread:
            self.take(upper)
        super().look(upper)

    def meet_standing(self, upper: Upper) -> None:
        super().meet_standing(upper)
        self.take(upper)

    def take(self, upper: Upper) -> None:
        """syncfs on the server's own descriptor."""
        _, upper.s_wb_err, _ = self.errseq.check_and_advance(upper.s_wb_err, self.errseq.sample(0))


def _ledger(upper: Upper) -> Ledger:
    ledger = Ledger()
    for _ in range(upper.recorded):
        ledger.record(EIO, 0.0, "probe")
    return ledger


def _account(upper: Upper, overlay: Party) -> Account:
    account = _ledger(upper).open_account("", volatile=overlay.volatile)
    account.mounted_at, account.reached, account.cursor = overlay.mounted_at, overlay.reached, overlay.s_wb_err
    return account


def _keep(overlay: Party, account: Account) -> None:
    overlay.reached, overlay.s_wb_err = account.reached, account.cursor
