"""What a design is: its answers. The base class is what all kernels have in common.

A method gets the upper and the overlay (and the open file), changes their cursors as the design's code would, and
returns an `Answer`. Cursors are real `errseq` words, and are changed by the kernel's functions (`overt.errseq`) or,
where the design brings its own, by those.

A flush that loses data is the verb `lose` right before the question: every design that flushes does so before it looks.
"""

from typing import NamedTuple, Protocol

from overt import errseq
from overt.prove.world import ABORTED, ALIVE, DEAD, UPPER, File, Party, Upper

EIO, ENOSPC = 5, 28


class Cursors(Protocol):
    """The operations on a cursor: `overt.errseq`, or a design's own (see there for what they return)."""

    COUNTER: int

    def set_error(self, cursor: int, errno: int, /) -> int: ...
    def sample(self, cursor: int, /) -> int: ...
    def check(self, cursor: int, since: int, /) -> int: ...
    def check_and_advance(self, cursor: int, since: int, /) -> tuple[int, int, int]: ...


class Answer(NamedTuple):
    """What a call returned."""

    errno: int = 0
    """positive, or 0"""
    flushed: bool = False
    """whether the upper (syncfs, umount) or the file (fsync) was flushed"""


class Design:
    """A design. Subclasses say what they do otherwise, and where that is written."""

    name: str
    title: str
    source: str
    """commit or mail"""
    errseq: Cursors = errseq
    """the kernel's cursors, the host's included"""
    served = False
    """whether a process serves its mounts, and can die"""

    def mount(self, upper: Upper, overlay: Party) -> int:
        """Mount: 0, or the errno with which it is refused."""
        return 0

    def umount(self, upper: Upper, overlay: Party) -> Answer:
        """Unmount: whether whoever unmounts is told of an error; umount(2) tells nobody. An ordinary one flushes."""
        return Answer(0, not overlay.volatile)

    def open(self, upper: Upper, overlay: Party, file: File) -> None:
        """Open: the file's position on its superblock's cursor (fs/open.c, do_dentry_open)."""
        file.f_sb_err = self.errseq.sample(overlay.s_wb_err)

    def fsync(self, upper: Upper, overlay: Party, file: File) -> Answer:
        """fsync(2), on a file: ordinary mounts pass it to the upper's file, volatile ones answer by themselves."""
        if overlay.volatile:
            return Answer()
        if overlay.inode.place != UPPER:
            return Answer()
        if file.real != UPPER:
            self.reach_copy(overlay, file)
        return Answer(self.advance_file(overlay, file), True)

    def msync(self, upper: Upper, overlay: Party, file: File) -> Answer:
        """msync(2), MS_SYNC, of a mapping of a file that is open for writing; of others it does nothing. It asks the
        upper's own file (backing_file_mmap), volatile or not; in kernel overlayfs that is the one that fsync asks."""
        return Answer(self.advance_file(overlay, file), True)

    def fsync_dir(self, upper: Upper, overlay: Party) -> Answer:
        """fsync(2) on a directory: passed on to the upper's, which has no pages and no error of its own; what may fail
        is the journal. Volatile: as on any file."""
        if overlay.volatile:
            return self.fsync(upper, overlay, File(is_open=True))
        return Answer(0 if upper.state == ALIVE else EIO, True)

    def syncfs(self, upper: Upper, overlay: Party, file: File) -> Answer:
        """syncfs(2)."""
        raise NotImplementedError

    def syncfs_read_only(self, upper: Upper, overlay: Party, file: File) -> Answer:
        """syncfs(2) on a superblock that is read-only: the filesystem is not asked (fs/sync.c, sync_filesystem)."""
        return Answer(self.advance_own(overlay, file))

    def remount(self, upper: Upper, overlay: Party, *, read_only: bool) -> Answer:
        """mount -o remount, of the superblock. Going read-only flushes an ordinary one's upper (ovl_reconfigure)."""
        if read_only and not overlay.volatile:
            return Answer(self.flush(upper), True)
        return Answer()

    def flushes_copies(self, overlay: Party) -> bool:
        """Whether a copy is flushed before it gets its name (ovl_copy_up_file)."""
        return not overlay.volatile

    def copied_up(self, overlay: Party) -> None:
        """The overlay's file was just copied up; some of its open files are of the lower one."""

    def struck(self, upper: Upper) -> None:
        """An error was recorded on the upper: for designs with eyes of their own."""

    def settle(self, party: Party) -> None:
        """Bring equal states into equal form; changes no answer."""
        if not party.host:
            self.rank_own(party)
        rank_files(self.errseq.COUNTER, party)

    def rank_own(self, overlay: Party) -> None:
        """Renumber what is on the cursor of the overlay's superblock."""
        own = ranks(self.errseq.COUNTER, [overlay.s_wb_err, *(file.f_sb_err for file in overlay.files)])
        overlay.s_wb_err = own[overlay.s_wb_err]
        for file in overlay.files:
            file.f_sb_err = own[file.f_sb_err]

    # Common to those who build upon it.

    def reach_copy(self, overlay: Party, file: File) -> None:
        """Until 6.14 the upper's file was opened for this one call (ovl_real_fdget): it counts from there."""
        file.f_wb_err = self.errseq.sample(overlay.inode.wb_err)

    def advance_file(self, overlay: Party, file: File) -> int:
        """file_check_and_advance_wb_err of the upper's file."""
        code, overlay.inode.wb_err, file.f_wb_err = self.errseq.check_and_advance(overlay.inode.wb_err, file.f_wb_err)
        return code

    def advance_own(self, overlay: Party, file: File) -> int:
        """What syncfs(2) ends with: errseq_check_and_advance of the overlay's superblock."""
        code, overlay.s_wb_err, file.f_sb_err = self.errseq.check_and_advance(overlay.s_wb_err, file.f_sb_err)
        return code

    def flush(self, upper: Upper) -> int:
        """sync_filesystem of the upper: what its ->sync_fs returns. ext4 after an abort: EIO, and then nothing."""
        if upper.state == ABORTED:
            upper.state = DEAD
            return EIO
        return 0


def host_syncfs(design: Design, upper: Upper, file: File) -> Answer:
    """syncfs(2) on a descriptor of the upper itself."""
    failed = design.flush(upper)
    code, upper.s_wb_err, file.f_sb_err = design.errseq.check_and_advance(upper.s_wb_err, file.f_sb_err)
    return Answer(failed or code, upper.state == ALIVE)


def rank_files(counter: int, party: Party) -> None:
    """Renumber what is on the cursor of the party's inode."""
    files = party.files
    positions = [*(file.f_wb_err for file in files), *(file.f_map_err for file in files)]
    data = ranks(counter, [party.inode.wb_err, *positions])
    party.inode.wb_err = data[party.inode.wb_err]
    for file in files:
        file.f_wb_err, file.f_map_err = data[file.f_wb_err], data[file.f_map_err]


def ranks(counter: int, words: list[int]) -> dict[int, int]:
    """New values for cursors of one kind, whose counter counts in steps of `counter`: as small as keeps them apart.

    Counters are compared for equality and only ever grow, so that their order among those who share them is all.
    """
    low = {number: rank for rank, number in enumerate(sorted({word // counter for word in words if word}))}
    return {word: word % counter + low[word // counter] * counter if word else 0 for word in words}
