"""overt's guard: stock kernel overlayfs, whose syncfs(2) is answered by an agent out of the same ledger."""

from overt.ledger import Description
from overt.prove.design import Answer
from overt.prove.designs.mainline import Mainline
from overt.prove.designs.watching import Watching, account_of, keep
from overt.prove.world import File, Party, Upper


class Guard(Watching, Mainline):
    """Of an ordinary overlay syncfs(2) does not reach the kernel, read-only or not: the agent flushes the upper, looks,
    and asks the ledger. It never sees open(2). When an error becomes known it holds every description that is open, and
    whoever is not held came later. Everything else, and volatile overlays, are left to mainline.

    In the model an overlay notes when it is asked, and not when another one is, who had been open by then: nobody can
    have been told in between."""

    name = "guard"
    title = "overt guard"
    source = "overt/ledger.py; overt/guard/overlay.py, overt/guard/agent.py"

    def mount(self, upper: Upper, overlay: Party) -> int:
        code = super().mount(upper, overlay)
        if code == 0 and not overlay.volatile:
            self.attach(upper, overlay)
        return code

    def umount(self, upper: Upper, overlay: Party) -> Answer:
        if not overlay.volatile:
            self.detach(upper)
        return super().umount(upper, overlay)

    def open(self, upper: Upper, overlay: Party, file: File) -> None:
        super().open(upper, overlay, file)
        if not overlay.volatile:
            file.f_sb_err, file.known = 0, upper.recorded

    def syncfs(self, upper: Upper, overlay: Party, file: File) -> Answer:
        if overlay.volatile:
            return super().syncfs(upper, overlay, file)
        failed = self.flush_and_look(upper)
        self.hold_open_ones(upper, overlay)
        account = account_of(upper, overlay)
        description = Description(file.f_sb_err) if file.held else account.open()
        code = account.syncfs(description)
        keep(overlay, account)
        if file.held:
            file.held = not code
            file.f_sb_err = description.since if file.held else 0
        return Answer(failed or code, True)

    def syncfs_read_only(self, upper: Upper, overlay: Party, file: File) -> Answer:
        if overlay.volatile:
            return super().syncfs_read_only(upper, overlay, file)
        return self.syncfs(upper, overlay, file)

    def hold_open_ones(self, upper: Upper, overlay: Party) -> None:
        """Before the first is told of an error: who is open, of those that are not held from an earlier one."""
        account = account_of(upper, overlay)
        if account.owed() is None:
            return
        for file in overlay.files:
            if file.is_open and not file.held and file.known < upper.recorded:
                file.held, file.f_sb_err = True, account.open().since
            file.known = upper.recorded if file.is_open else 0
        account.open()
        keep(overlay, account)
