"""The use cases as properties of histories. Written without the designs: from what was asked, what was answered and
ghosts.

A use case is a row of CLAIMS. Each of its rules has a situation, which is looked at when a call has returned, and what
the call must have answered. *Always*: in every such situation, in every history. *Sometimes*: the situation arises,
with that answer, in some history; without it, a design in which nobody is ever told would pass all that begins "after
somebody was".

`remember` is the account of who is owed what. It is the plain reading of the contract:

    an error       strikes every overlay mounted, and every description open: they are due
    being told     settles it for that description, and for the overlay's next new one (waiting no more)
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from overt.prove.design import Answer
from overt.prove.world import ALIVE, LOWER, UPPER, Asked, File, Party, Seen, Upper


class Call(NamedTuple):
    """A call that has returned, before anybody takes note of it."""

    verb: str
    upper: Upper
    party: Party
    file: File
    answer: Answer


class Rule(NamedTuple):
    """When a call like this has returned, it must have answered so."""

    verbs: tuple[str, ...]
    when: Callable[[Call], bool]
    then: Callable[[Call], bool]
    due: str = ""
    """what that is, in words; the words for `told` and `silent` are known"""
    sometimes: bool = True
    """whether the situation has to arise"""

    @property
    def words(self) -> str:
        """What had to be, for a timeline."""
        return self.due or ("0 is due" if self.then is silent else "an error is due")


class Claim(NamedTuple):
    """A row of CLAIMS."""

    must: bool
    text: str
    rules: tuple[Rule, ...] = ()
    beyond: str = ""
    """what of it the model cannot say, and why"""
    served: bool = False
    """whether it is about designs with a serving process only"""


def told(call: Call) -> bool:
    return call.answer.errno != 0


def silent(call: Call) -> bool:
    return call.answer.errno == 0


def ordinary(when: Callable[[Call], bool]) -> Callable[[Call], bool]:
    return lambda call: not call.party.volatile and not call.party.host and when(call)


def volatile(when: Callable[[Call], bool]) -> Callable[[Call], bool]:
    return lambda call: call.party.volatile and when(call)


def waiting(call: Call) -> bool:
    return call.party.seen.waiting


def on_host(when: Callable[[Call], bool]) -> Callable[[Call], bool]:
    return lambda call: call.party.host and when(call)


def lost(call: Call) -> bool:
    """An error of this file itself, on a description that is not from before the copy-up."""
    return call.file.fsync.due and not call.file.fsync.early


SYNCFS, FSYNC, MSYNC, FSYNC_DIR = ("syncfs",), ("fsync",), ("msync",), ("fsync_dir",)
READ_ONLY = ("syncfs, read-only",)
"""a superblock that was remounted so is asked in vain, which is a use case of its own (`_question`)"""

CLAIMS: Mapping[int, Claim] = {
    1: Claim(
        True,
        "the fd that wrote: fsync is told, once",
        (
            Rule(FSYNC, ordinary(lambda c: lost(c) and not c.file.fsync.again and c.file.fsync.wrote), told),
            Rule(FSYNC, ordinary(lambda c: c.file.fsync.told and c.file.fsync.wrote), silent),
        ),
    ),
    2: Claim(
        True,
        "every other fd open on that file at the error: told once each",
        (
            Rule(FSYNC, ordinary(lambda c: lost(c) and not c.file.fsync.again and not c.file.fsync.wrote), told),
            Rule(FSYNC, ordinary(lambda c: c.file.fsync.told and not c.file.fsync.wrote), silent),
        ),
    ),
    3: Claim(
        False,
        "an fd opened on it after the error, nobody told yet: told",
        (Rule(FSYNC, ordinary(lambda c: _new(c) and not c.party.inode.evicted), told),),
    ),
    4: Claim(
        True,
        "volatile: every fsync and syncfs in every container, for ever",
        (
            Rule(SYNCFS, volatile(lambda c: c.party.seen.struck), told),
            Rule(FSYNC, volatile(lambda c: c.party.seen.struck), told),
        ),
    ),
    5: Claim(
        True,
        "ordinary: the first syncfs on a new fd, in each container",
        (Rule(SYNCFS, ordinary(lambda c: waiting(c) and not c.file.syncfs.due), told),),
    ),
    6: Claim(
        True,
        "ordinary: syncfs on each fd opened before the error, once each",
        (Rule(SYNCFS, ordinary(lambda c: c.file.syncfs.due and not c.file.syncfs.again), told),),
    ),
    7: Claim(
        True,
        "ordinary: the second syncfs returns 0, on the same fd and on one opened since",
        (
            Rule(SYNCFS + READ_ONLY, ordinary(lambda c: c.file.syncfs.asked and c.upper.state == ALIVE), silent),
            Rule(SYNCFS + READ_ONLY, ordinary(lambda c: _late(c) and c.upper.state == ALIVE), silent, sometimes=False),
        ),
    ),
    8: Claim(
        True,
        "a second error after the first was told: told again",
        (
            Rule(SYNCFS, ordinary(lambda c: c.file.syncfs.due and c.file.syncfs.again), told),
            Rule(FSYNC, ordinary(lambda c: lost(c) and c.file.fsync.again), told),
        ),
    ),
    9: Claim(
        False,
        "an error before the mount: not told to it, and a volatile mount is not refused",
        (
            Rule(
                SYNCFS + READ_ONLY,
                lambda c: not c.party.host and not c.party.seen.struck and c.upper.errors > 0,
                silent,
            ),
            Rule(("mount",), volatile(lambda c: c.upper.errors > 0), silent, "a mount is due"),
        ),
    ),
    10: Claim(
        False,
        "containers being told does not take the unseen error from the host",
        (Rule(SYNCFS, on_host(lambda c: waiting(c) and c.upper.container_told), told),),
    ),
    11: Claim(
        True,
        "the host being told first does not hide it from containers",
        (Rule(SYNCFS, lambda c: not c.party.host and waiting(c) and c.upper.host_told, told),),
    ),
    12: Claim(
        True,
        "one container being told does not hide it from the next",
        (Rule(SYNCFS, lambda c: not c.party.host and waiting(c) and c.upper.container_told, told),),
    ),
    13: Claim(
        True,
        "ordinary: syncfs = 0 means that the device has the data, but for what was told lost",
        (
            Rule(
                SYNCFS,
                ordinary(silent),
                lambda c: not c.party.inode.dirty and not c.party.seen.lost,
                "the data is not on the device: an error is due",
            ),
            Rule(SYNCFS, ordinary(lambda c: c.party.seen.lost), told),
        ),
    ),
    14: Claim(
        True,
        "volatile: the upper is never flushed",
        (
            Rule(
                (*FSYNC, *FSYNC_DIR, *SYNCFS, *READ_ONLY, "umount", "remount_ro", "remount_rw"),
                volatile(lambda c: True),
                lambda c: not c.answer.flushed,
                "nothing may be flushed",
            ),
        ),
        beyond="msync, which reaches the upper's file without the overlay being asked (U20); O_SYNC writes, which are "
        "tried on the real thing",
    ),
    15: Claim(
        False,
        "fd opened read-only before copy-up; the copy fails later; fsync on the old fd is told",
        (Rule(FSYNC, ordinary(lambda c: c.file.fsync.due and c.file.fsync.early), told),),
    ),
    16: Claim(
        True,
        "fsync on a file that only a lower layer has: 0 (volatile after an error: EIO)",
        (
            Rule(FSYNC, lambda c: c.party.inode.place == LOWER and not _sticky(c), silent),
            Rule(FSYNC, lambda c: c.party.inode.place == LOWER and _sticky(c), told),
        ),
    ),
    17: Claim(
        True,
        "copy-up that the disk refuses: error returned, old content intact",
        (
            Rule(
                ("copy_fails",),
                ordinary(lambda c: True),
                lambda c: told(c) and c.party.inode.place == LOWER,
                "an error is due, and the file as it was",
            ),
        ),
        beyond="*at any step*: a copy-up is one step here; its system calls are failed one by one on the real thing. "
        "A volatile mount does not flush what it copies, so that no copy-up fails there: what is lost later is U4's",
    ),
    18: Claim(
        True,
        "fsync of a directory: as the upper can keep it; volatile: EIO after an error",
        (
            Rule(FSYNC_DIR, ordinary(lambda c: c.upper.state != ALIVE), told),
            Rule(FSYNC_DIR, volatile(lambda c: c.party.seen.struck), told),
            Rule(FSYNC_DIR, lambda c: c.upper.state == ALIVE and not _sticky(c), silent),
        ),
        beyond="what a directory's entries are, and a block of metadata that is lost without the journal aborting",
    ),
    19: Claim(
        True,
        "an aborted journal: every syncfs is answered with EIO",
        (Rule(SYNCFS, ordinary(lambda c: c.upper.state != ALIVE), told),),
    ),
    20: Claim(
        True,
        "msync, and an O_SYNC write: told of what was lost, once",
        (
            Rule(MSYNC, ordinary(lambda c: c.file.msync.due), told),
            Rule(MSYNC, ordinary(lambda c: c.file.msync.told), silent),
        ),
        beyond="sync_file_range reads the cursor of the overlay's own inode, which has no pages in any design: 0. "
        "fdatasync is fsync (U1, U2). On a volatile mount msync is no question to the overlay (U14 leaves it out)",
    ),
    21: Claim(
        False,
        "the inode was evicted between the error and the reopening: fsync is still told",
        (Rule(FSYNC, ordinary(lambda c: _new(c) and c.party.inode.evicted), told),),
    ),
    22: Claim(
        False,
        "only the container whose file was lost is told, bystanders are not",
        (
            Rule(SYNCFS, ordinary(lambda c: c.party.seen.struck and not c.party.seen.mine), silent),
            Rule(SYNCFS, ordinary(lambda c: c.party.seen.waiting and c.party.seen.lost), told),
        ),
    ),
    23: Claim(
        False,
        "the serving process dies and returns: no error lost",
        (Rule(SYNCFS, ordinary(lambda c: c.party.seen.orphan), told),),
        beyond="*none told twice*: whoever asks after the death does so on another mount and another descriptor. "
        "*Or is replaced*, the mounts staying: no server of a design here can be; the guard's worker can, which is "
        "tried on the real thing",
        served=True,
    ),
    24: Claim(
        False,
        "the error appears at unmount",
        (
            Rule(("umount",), lambda c: c.party.seen.waiting, told, "whoever unmounts is to be told"),
            Rule(("umount",), lambda c: not c.party.seen.struck, silent, "there was no error: 0 is due"),
        ),
    ),
    25: Claim(
        True,
        "ordinary: a read-only remount hides no error that was there before it from syncfs",
        (Rule(READ_ONLY, ordinary(lambda c: not c.party.seen.later and (waiting(c) or c.file.syncfs.due)), told),),
        beyond="volatile mounts, which no claim asks about once they are read-only: every syncfs with EIO is what no "
        "design gives, overt included (rule 8 of the contract, unsolved there). An error that comes to the upper by "
        "others after the remount, of which overt's superblock does not hear either, and an upper that has died, of "
        "which each descriptor is told once there. Overlay on overlay, special files, O_PATH: there is one layer of "
        "overlays here, and a file is one",
    ),
}


def _late(call: Call) -> bool:
    """A description opened when the overlay had settled the last error."""
    seen, asked = call.party.seen, call.file.syncfs
    return seen.struck and not seen.waiting and not (asked.due or asked.hoping)


def _new(call: Call) -> bool:
    """A description opened after the file's error, of which fsync has told nobody."""
    return call.party.inode.place == UPPER and call.party.inode.lost and not call.file.fsync.due


def _sticky(call: Call) -> bool:
    return call.party.volatile and call.party.seen.struck


RuleId = tuple[int, int]
"""a use case, and which of its rules"""


def judge(call: Call) -> dict[RuleId, bool]:
    """For each rule whose situation this is: whether the answer is as it must be."""
    return {name: rule.then(call) for name, rule in _BY_VERB.get(_question(call), ()) if rule.when(call)}


def _question(call: Call) -> str:
    return READ_ONLY[0] if call.verb == "syncfs" and call.party.read_only else call.verb


_BY_VERB: dict[str, list[tuple[RuleId, Rule]]] = {}
for _number, _claim in CLAIMS.items():
    for _index, _rule in enumerate(_claim.rules):
        for _verb in _rule.verbs:
            _BY_VERB.setdefault(_verb, []).append(((_number, _index), _rule))


def remember(call: Call) -> bool:
    """Take note of a call; return whether it was an error, which the others have to hear of (`strike`)."""
    upper, party, file, answer = call.upper, call.party, call.file, call.answer
    seen = party.seen
    match call.verb:
        case "mount":
            party.seen = Seen(orphan=seen.orphan)
        case "umount":
            party.seen = Seen()
        case "open" | "open_write":
            file.syncfs.hoping = (seen.waiting or seen.unsure) and not party.volatile and not party.host
        case "remount_ro" | "remount_rw":
            seen.later = False
        case "die":
            party.seen = Seen(orphan=seen.orphan or (seen.waiting and not party.volatile))
        case "syncfs" if party.read_only and not answer.errno:
            pass  # nobody was asked
        case "syncfs" if party.read_only and seen.later:
            file.syncfs.due = file.syncfs.again = seen.waiting = False
            file.syncfs.hoping = seen.unsure = True
        case "syncfs":
            seen.unsure = False
            _asked(file.syncfs, seen.struck or party.host, answer)
            if answer.errno:
                seen.waiting = seen.lost = seen.orphan = False
                if party.host:
                    upper.host_told = True
                else:
                    upper.container_told = True
        case "fsync":
            _asked(file.fsync, party.inode.lost or file.fsync.due, answer)
            file.msync.due = False
            if answer.errno:
                party.inode.lost = party.inode.evicted = False
        case "msync":
            _asked(file.msync, file.msync.due, answer)
            file.fsync.due = file.fsync.again = False  # whether both are told of one error is the kernel's affair
            if answer.errno:
                party.inode.lost = party.inode.evicted = False
        case "evict":
            party.inode.evicted = party.inode.lost
        case "lose" | "lose_space" | "copy_fails":
            if not party.host and not answer.errno:
                seen.lost = seen.mine = party.inode.lost = True
                party.inode.evicted = False
                for one in party.files:
                    _struck(one, one.fsync)
                    _struck(one, one.msync)
            upper.host_told = upper.container_told = False
            return True
    return False


def strike(party: Party) -> None:
    """An error was recorded on the upper."""
    if party.mounted or party.host:
        party.seen.struck = party.seen.waiting = True
        party.seen.later, party.seen.unsure = party.read_only, False
        for file in party.files:
            _struck(file, file.syncfs)


def _struck(file: File, asked: Asked) -> None:
    if file.is_open:
        asked.due, asked.again = True, asked.asked
        asked.asked = asked.told = asked.hoping = False


def _asked(asked: Asked, struck: bool, answer: Answer) -> None:
    asked.asked = asked.asked or struck
    asked.told = asked.told or (struck and answer.errno != 0)
    asked.due = asked.again = asked.hoping = False
