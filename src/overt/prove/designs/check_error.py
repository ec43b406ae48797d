"""Vivek Goyal's v3: the overlay's open files carry a cursor of the upper."""

from overt.prove.design import Answer, Design
from overt.prove.world import File, Party, Upper


class CheckError(Design):
    """Patch 3/3 samples the upper's cursor into f_sb_err when a file of the overlay is opened; syncfs(2) asks a new
    superblock operation, ->check_error, which checks and advances the *upper's* cursor with it. All overlays, and the
    host, share its single SEEN flag. Patch 1/3 has syncfs(2) return what ->sync_fs returns."""

    name = "check_error"
    title = "Vivek Goyal's v3"
    source = (
        "[PATCH v3 0-3/3] vfs, overlayfs: fix syncfs() return code, report writeback errors on upper (December 2020)"
    )

    def open(self, upper: Upper, overlay: Party, file: File) -> None:
        file.f_sb_err = self.errseq.sample(upper.s_wb_err)

    def syncfs(self, upper: Upper, overlay: Party, file: File) -> Answer:
        failed = 0 if overlay.volatile else self.flush(upper)
        code, upper.s_wb_err, file.f_sb_err = self.errseq.check_and_advance(upper.s_wb_err, file.f_sb_err)
        return Answer(failed or code, not overlay.volatile)

    def syncfs_read_only(self, upper: Upper, overlay: Party, file: File) -> Answer:
        """->check_error is asked all the same."""
        code, upper.s_wb_err, file.f_sb_err = self.errseq.check_and_advance(upper.s_wb_err, file.f_sb_err)
        return Answer(code)

    def rank_own(self, overlay: Party) -> None:
        """Nothing to renumber: these are positions on the upper's cursor."""
