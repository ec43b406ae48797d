"""Jeff Layton's RFC: a volatile mount samples the upper's cursor without marking it, and hands on what comes later."""

from overt.prove.design import EIO, Answer, Design
from overt.prove.designs import split
from overt.prove.world import File, Party, Upper


class Layton(Design):
    """`errseq_peek` at the mount; in ->sync_fs, if the upper's cursor has moved since, the error is set on the
    overlay's superblock, where syncfs(2) finds it. fsync on a volatile mount says 0 as before, and ordinary mounts are
    left alone."""

    name = "layton"
    title = "Jeff Layton's RFC"
    source = "errseq: split the SEEN flag; overlay: propagate errors for volatile mounts (linux-unionfs, December 2020)"
    errseq = split

    def mount(self, upper: Upper, overlay: Party) -> int:
        if overlay.volatile:
            upper.s_wb_err, overlay.mark = split.peek(upper.s_wb_err)
        return 0

    def syncfs(self, upper: Upper, overlay: Party, file: File) -> Answer:
        if not overlay.volatile:
            self.flush(upper)
        elif split.check(upper.s_wb_err, overlay.mark):
            overlay.s_wb_err = split.set_error(overlay.s_wb_err, EIO)
        return Answer(self.advance_own(overlay, file), not overlay.volatile)
