"""overt's mount: its own ledger, `overt.ledger`, asked as the server asks it (overt/server/syncing.py, overt/upper)."""

from overt.ledger import Description
from overt.prove.design import EIO, Answer
from overt.prove.designs.watching import Watching, account_of
from overt.prove.world import UPPER, File, Party, Upper


class OvertMount(Watching):
    """An error that the ledger says is owed is put on the cursor of the overlay's own superblock while syncfs(2) waits;
    who is told is then the kernel's errseq. On a superblock that was remounted read-only syncfs(2) does not reach the
    server, so that the error is put there at the remount. A volatile mount is not looked after in this way."""

    name = "overt"
    title = "overt mount"
    source = "overt/ledger.py; overt/server/syncing.py, overt/server/reopening.py, overt/upper/upper.py"
    served = True

    def mount(self, upper: Upper, overlay: Party) -> int:
        self.attach(upper, overlay)
        return 0

    def umount(self, upper: Upper, overlay: Party) -> Answer:
        self.look(upper)
        told = EIO if account_of(upper, overlay).count else 0
        self.detach(upper)
        return Answer(told, not overlay.volatile)

    def open(self, upper: Upper, overlay: Party, file: File) -> None:
        """The kernel's part; and a mapping belongs to an open file of its own (fuse_passthrough_open)."""
        super().open(upper, overlay, file)
        file.f_map_err = self.errseq.sample(overlay.inode.wb_err)

    def syncfs(self, upper: Upper, overlay: Party, file: File) -> Answer:
        if overlay.volatile:
            self.look(upper)
            return Answer(account_of(upper, overlay).syncfs(Description(file.f_sb_err)))
        failed = self.flush_and_look(upper)
        self.carry(upper, overlay)
        return Answer(failed or self.advance_own(overlay, file), True)

    def carry(self, upper: Upper, overlay: Party) -> None:
        """Put what the overlay is owed on its superblock's cursor (server/poison.py), where the kernel finds it."""
        account = account_of(upper, overlay)
        owed = account.owed()
        if owed is not None:
            overlay.s_wb_err = self.errseq.set_error(overlay.s_wb_err, owed.errno)
            account.propagated(owed)
            overlay.reached = account.reached

    def remount(self, upper: Upper, overlay: Party, *, read_only: bool) -> Answer:
        """fuse_reconfigure: as long as it is writable the server is asked to flush, by no syncfs(2), and the answer is
        dropped. But the cursor is set before mount(2) returns (server/reopening.py)."""
        if not read_only:
            return Answer()
        if overlay.volatile:
            self.look(upper)
            return Answer()
        self.flush_and_look(upper)
        self.carry(upper, overlay)
        return Answer(0, True)

    def fsync(self, upper: Upper, overlay: Party, file: File) -> Answer:
        if overlay.volatile:
            self.look(upper)
            account = account_of(upper, overlay)
            return Answer(account.tell(account.sticky()))
        return super().fsync(upper, overlay, file)

    def msync(self, upper: Upper, overlay: Party, file: File) -> Answer:
        inode = overlay.inode
        code, inode.wb_err, file.f_map_err = self.errseq.check_and_advance(inode.wb_err, file.f_map_err)
        return Answer(code, True)

    def copied_up(self, overlay: Party) -> None:
        """Every open file of the server's is opened again, on the copy."""
        for file in overlay.files:
            if file.is_open:
                file.real, file.f_wb_err = UPPER, self.errseq.sample(overlay.inode.wb_err)


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
