"""Mainline since 34b4540e6646 (v6.12): the same answers with less code; and since 6.14 one upper file for each open
file."""

from overt.prove.design import EIO, Answer
from overt.prove.designs.sticky import Sticky
from overt.prove.world import UPPER, File, Party, Upper


class Mainline(Sticky):
    """syncfs(2) returns what ->sync_fs returns (5679897eb104, v5.17), so that nothing is set by hand any more; a flush
    that fails is heard on ordinary mounts too. An open file that predates the copy-up opens the upper's file when that
    is first needed, and keeps it (18e48d0e2c7b, v6.14)."""

    name = "mainline"
    title = "mainline 34b4540e6646"
    source = "34b4540e6646 (v6.12) ovl: don't set the superblock's errseq_t manually"

    def syncfs(self, upper: Upper, overlay: Party, file: File) -> Answer:
        failed = (EIO if self.status(upper, overlay) else 0) if overlay.volatile else self.flush(upper)
        code = self.advance_own(overlay, file)
        return Answer(failed or code, not overlay.volatile)

    def reach_copy(self, overlay: Party, file: File) -> None:
        super().reach_copy(overlay, file)
        file.real = UPPER
