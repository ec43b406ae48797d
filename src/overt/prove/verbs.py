"""What can happen, one thing at a time: to the upper and one party. The rest of the world does not change.

Each verb is done to copies of an upper and a party, at one of the party's open files or at none; it returns an
`Answer`, or None if it cannot happen there, and has changed nothing. What a kernel does on behalf of any design is
here; what differs is the design's.

Not here, because in this world it would be nothing new: dup (an open file is one, whatever its descriptors); sync(2)
(all designs look at its caller's errors at syncfs only); a failed write-back during a question (`lose`, right before
it); fdatasync (it asks as fsync does); an O_SYNC write (it writes, and then asks as msync does); sync_file_range (it
asks the overlay's own inode, which has no pages, and gets 0).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from overt.prove.design import EIO, ENOSPC, Answer, Design, host_syncfs
from overt.prove.world import ABORTED, ALIVE, LOWER, NONE, UPPER, File, Inode, Party, Upper

OK = Answer()


class Verb(NamedTuple):
    """A row of VERBS."""

    do: Callable[[Design, Upper, Party, File], Answer | None]
    words: str
    """for a timeline; {fd} is filled in"""
    on: str = ""
    """"open": it is done to each open file in turn; "free": to a free place for one; else to none"""
    error: bool = False
    """whether it records an error, of which a scope has so many"""


def mount(design: Design, upper: Upper, party: Party, _: File) -> Answer | None:
    if party.mounted:
        return None
    code = design.mount(upper, party)
    party.mounted = code == 0
    return Answer(code)


def remount_ro(design: Design, upper: Upper, party: Party, _: File) -> Answer | None:
    """The superblock becomes read-only; not while a file is open for writing (EBUSY)."""
    if party.read_only or any(file.writable for file in party.files):
        return None
    return _remount(design, upper, party, read_only=True)


def remount_rw(design: Design, upper: Upper, party: Party, _: File) -> Answer | None:
    if not party.read_only:
        return None
    return _remount(design, upper, party, read_only=False)


def _remount(design: Design, upper: Upper, party: Party, *, read_only: bool) -> Answer | None:
    if not party.mounted:
        return None
    answer = design.remount(upper, party, read_only=read_only)
    if answer.errno == 0:
        party.read_only = read_only
    if answer.flushed:
        party.inode.dirty = False
    return answer


def umount(design: Design, upper: Upper, party: Party, _: File) -> Answer | None:
    if not party.mounted or any(file.is_open for file in party.files):
        return None
    answer = design.umount(upper, party)
    if party.read_only:  # generic_shutdown_super
        answer = answer._replace(flushed=False)
    _forget(party)
    return answer


def die(design: Design, upper: Upper, party: Party, _: File) -> Answer | None:
    """The process that serves the mount is killed, and with it goes the mount."""
    if not party.mounted or not design.served:
        return None
    design.umount(upper, party)
    _forget(party)
    return OK


def _forget(party: Party) -> None:
    party.mounted = party.read_only = False
    party.s_wb_err = party.mark = party.mounted_at = party.reached = 0
    party.files = [File() for _ in party.files]
    party.inode = Inode(LOWER if party.inode.place else NONE)


def open_read(design: Design, upper: Upper, party: Party, free: File) -> Answer | None:
    return _open(design, upper, party, free, writable=False)


def open_write(design: Design, upper: Upper, party: Party, free: File) -> Answer | None:
    """Opening a lower file for writing copies it up."""
    return _open(design, upper, party, free, writable=True)


def copy_fails(design: Design, upper: Upper, party: Party, free: File) -> Answer | None:
    """The disk refuses the pages of the copy which that open makes: found by its flush, or when all is done."""
    if not party.mounted or party.read_only or party.inode.place != LOWER:
        return None
    if design.flushes_copies(party):
        _record(design, upper, EIO)
        return Answer(EIO)
    _open(design, upper, party, free, writable=True)
    party.inode.dirty = True
    return lose(design, upper, party, free)


def _open(design: Design, upper: Upper, party: Party, free: File, *, writable: bool) -> Answer | None:
    if not party.mounted or (writable and party.read_only):
        return None
    if writable and party.inode.place == LOWER:
        party.inode = Inode(UPPER)
        design.copied_up(party)
        for file in party.files:
            file.fsync.early = file.is_open
    free.is_open, free.real, free.writable = True, party.inode.place, writable
    free.f_wb_err = design.errseq.sample(party.inode.wb_err)
    if party.host:
        free.f_sb_err = design.errseq.sample(upper.s_wb_err)
    else:
        design.open(upper, party, free)
    return OK


def close(design: Design, upper: Upper, party: Party, file: File) -> Answer | None:
    # By identity: two that are alike are equal.
    party.files = [File() if one is file else one for one in party.files]
    return OK


def write(design: Design, upper: Upper, party: Party, file: File) -> Answer | None:
    if not file.writable or (party.inode.dirty and file.fsync.wrote):
        return None
    party.inode.dirty = file.fsync.wrote = True
    return OK


def write_back(design: Design, upper: Upper, party: Party, _: File) -> Answer | None:
    """The kernel writes the file's pages out in its own time, and it goes well."""
    if not party.inode.dirty:
        return None
    party.inode.dirty = False
    return OK


def lose(design: Design, upper: Upper, party: Party, _: File) -> Answer | None:
    """The disk refuses the pages; they are marked clean all the same. mapping_set_error: the file, and the
    superblock."""
    return _lose(design, upper, party, EIO)


def lose_space(design: Design, upper: Upper, party: Party, _: File) -> Answer | None:
    """The same with another errno: the disk had promised room that it does not have (thin provisioning)."""
    return _lose(design, upper, party, ENOSPC)


def _lose(design: Design, upper: Upper, party: Party, errno: int) -> Answer | None:
    if not (party.inode.dirty or party.host):
        return None
    if not party.host:
        party.inode.dirty = False
        party.inode.wb_err = design.errseq.set_error(party.inode.wb_err, errno)
    _record(design, upper, errno)
    return OK


def _record(design: Design, upper: Upper, errno: int) -> None:
    upper.s_wb_err = design.errseq.set_error(upper.s_wb_err, errno)
    upper.errors += 1
    design.struck(upper)


def evict(design: Design, upper: Upper, party: Party, _: File) -> Answer | None:
    """Memory is short: an inode that nobody has open goes, and its cursor with it."""
    inode = party.inode
    if inode.place != UPPER or inode.dirty or not inode.wb_err or any(file.is_open for file in party.files):
        return None
    inode.wb_err = 0
    return OK


def abort(design: Design, upper: Upper, party: Party, _: File) -> Answer | None:
    """The journal of the upper aborts."""
    if upper.state != ALIVE:
        return None
    upper.state = ABORTED
    return OK


def fsync(design: Design, upper: Upper, party: Party, file: File) -> Answer | None:
    answer = design.fsync(upper, party, file)
    if answer.flushed:
        party.inode.dirty = False
    return answer


def msync(design: Design, upper: Upper, party: Party, file: File) -> Answer | None:
    if not file.writable:  # what is mapped cannot be dirty: VM_SHARED is cleared
        return None
    answer = design.msync(upper, party, file)
    if answer.flushed:
        party.inode.dirty = False
    return answer


def fsync_dir(design: Design, upper: Upper, party: Party, _: File) -> Answer | None:
    return design.fsync_dir(upper, party) if party.mounted else None


def syncfs(design: Design, upper: Upper, party: Party, file: File) -> Answer | None:
    if party.host:
        return host_syncfs(design, upper, file)
    ask = design.syncfs_read_only if party.read_only else design.syncfs
    answer = ask(upper, party, file)
    if answer.flushed:
        party.inode.dirty = False
    return answer


VERBS: Mapping[str, Verb] = {
    "mount": Verb(mount, "mount"),
    "open": Verb(open_read, "open {fd}", "free"),
    "open_write": Verb(open_write, "open {fd} for writing", "free"),
    "write": Verb(write, "write to {fd}", "open"),
    "write_back": Verb(write_back, "its pages are written back"),
    "lose": Verb(lose, "a write is lost: 1 writeback error recorded in upper sb", error=True),
    "lose_space": Verb(lose_space, "a write is lost for want of space: ENOSPC recorded in upper sb", error=True),
    "copy_fails": Verb(copy_fails, "open {fd} for writing, and the disk refuses the copy", "free", error=True),
    "abort": Verb(abort, "the journal of the upper aborts"),
    "syncfs": Verb(syncfs, "syncfs({fd})", "open"),
    "fsync": Verb(fsync, "fsync({fd})", "open"),
    "msync": Verb(msync, "msync of {fd}", "open"),
    "fsync_dir": Verb(fsync_dir, "fsync of the directory"),
    "close": Verb(close, "close {fd}", "open"),
    "evict": Verb(evict, "the inode is evicted"),
    "remount_ro": Verb(remount_ro, "remount read-only"),
    "remount_rw": Verb(remount_rw, "remount writable"),
    "umount": Verb(umount, "umount"),
    "die": Verb(die, "the server is killed"),
}
