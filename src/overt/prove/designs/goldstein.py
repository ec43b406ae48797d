"""Amir Goldstein's variation: both kinds of mount sample at the mount and hand new errors on to their own
superblock."""

from overt.prove.design import EIO, Answer, Design
from overt.prove.designs import split
from overt.prove.world import File, Party, Upper


class Goldstein(Design):
    """The mail names the idea and the outcome: "sample upper sb error on mount and propagate new errors to overlayfs
    sb"; ordinary: the first syncfs in every container; volatile: every syncfs and every fsync in every container. What
    is written here is the smallest change to Jeff Layton's patch that does so: an ordinary mount moves its mark when it
    has handed an error on, a volatile one does not and is asked by fsync too."""

    name = "goldstein"
    title = "Amir Goldstein's variation"
    source = "Re: [PATCH 3/3] overlayfs: Report writeback errors on upper (4 January 2021)"
    errseq = split

    def mount(self, upper: Upper, overlay: Party) -> int:
        upper.s_wb_err, overlay.mark = split.peek(upper.s_wb_err)
        return 0

    def syncfs(self, upper: Upper, overlay: Party, file: File) -> Answer:
        failed = 0 if overlay.volatile else self.flush(upper)
        if split.check(upper.s_wb_err, overlay.mark):
            overlay.s_wb_err = split.set_error(overlay.s_wb_err, EIO)
            if not overlay.volatile:
                upper.s_wb_err, overlay.mark = split.peek(upper.s_wb_err)
        code = self.advance_own(overlay, file)
        return Answer(failed or code, not overlay.volatile)

    def fsync(self, upper: Upper, overlay: Party, file: File) -> Answer:
        if overlay.volatile:
            return Answer(split.check(upper.s_wb_err, overlay.mark))
        return super().fsync(upper, overlay, file)
