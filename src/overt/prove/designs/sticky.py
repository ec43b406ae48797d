"""Mainline since 335d3fc57941 (v5.11): any error of the upper since a volatile mount is answered for ever."""

from overt.prove.design import EIO, Answer, Design
from overt.prove.world import File, Party, Upper


class Sticky(Design):
    """A volatile mount samples the upper's cursor, and is refused while an error stands unseen there, because such a
    sample could not tell the next error from this one. fsync and syncfs compare; syncfs(2) drops what ->sync_fs
    returns, so the error is set on the overlay's superblock by hand each time. Ordinary mounts are left alone."""

    name = "sticky"
    title = "mainline 335d3fc57941"
    source = "335d3fc57941 (v5.11) ovl: implement volatile-specific fsync error behaviour"

    def mount(self, upper: Upper, overlay: Party) -> int:
        if overlay.volatile:
            overlay.mark = self.errseq.sample(upper.s_wb_err)
            if self.status(upper, overlay):
                return EIO
        return 0

    def syncfs(self, upper: Upper, overlay: Party, file: File) -> Answer:
        if not overlay.volatile:
            self.flush(upper)
        elif self.status(upper, overlay):
            overlay.s_wb_err = self.errseq.set_error(overlay.s_wb_err, EIO)
        return Answer(self.advance_own(overlay, file), not overlay.volatile)

    def fsync(self, upper: Upper, overlay: Party, file: File) -> Answer:
        if overlay.volatile:
            return Answer(self.status(upper, overlay))
        return super().fsync(upper, overlay, file)

    def status(self, upper: Upper, overlay: Party) -> int:
        """ovl_sync_status, of a volatile mount."""
        return self.errseq.check(upper.s_wb_err, overlay.mark)
