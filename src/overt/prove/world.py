"""The pieces of the model: the upper, overlays on it, their open files; named as the kernel names them.

A piece is a small record of plain values. Whatever happens is done to an upper and one *party*, which is an overlay
(with one file in it) or the host: no design reaches further, and that locality is what the checker's speed rests on. An
error is the exception, and a simple one: everybody's ghost hears of it.

*Ghosts* are what the claims remember: who has asked since the last error, who was told. No design reads one, and only
`claims` writes them.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Self

NONE, LOWER, UPPER = 0, 1, 2
"""where a file is, or what an open file was opened on; NONE: the file does not matter"""
ALIVE, ABORTED, DEAD = 0, 1, 2
"""an upper; one whose journal has aborted, before its next flush and after"""


class Record:
    """A record that can be copied, and that has a key: equal keys, equal pieces.

    Both are most of what the model costs, so that each kind of record gets its own (`_write_out`, below).
    """

    __slots__ = ()

    def copy(self) -> Self:
        """A copy that shares nothing with the original."""
        raise NotImplementedError

    def key(self) -> tuple[Any, ...]:
        """Everything in it, hashable and ordered."""
        raise NotImplementedError


@dataclass(slots=True)
class Asked(Record):
    """Ghost of an open file, for one kind of question (syncfs, fsync, or msync)."""

    due: bool = False
    """it was open when an error was recorded, and has not asked since"""
    again: bool = False
    """due, and it had asked after an earlier error"""
    asked: bool = False
    """it has asked since the last error that struck it"""
    told: bool = False
    """and was told of it"""
    hoping: bool = False
    """it was opened while nobody in its overlay had been told: it may be told, even if another is first"""
    wrote: bool = False
    """it wrote what was lost (fsync)"""
    early: bool = False
    """it was opened before the file's copy-up (fsync)"""


@dataclass(slots=True)
class File(Record):
    """An open file description: what dup(2), fork(2) and SCM_RIGHTS share."""

    is_open: bool = False
    """a free place otherwise"""
    syncfs: Asked = field(default_factory=Asked)
    fsync: Asked = field(default_factory=Asked)
    msync: Asked = field(default_factory=Asked)
    f_sb_err: int = 0
    f_wb_err: int = 0
    f_map_err: int = 0
    """the position of its mapping on the inode's cursor, for designs in which that is another open file"""
    known: int = 0
    """the guard: how many errors were known when it was opened"""
    held: bool = False
    """the guard: it was open when an error became known, and is yet to be told"""
    real: int = NONE
    """the layer that its data comes from"""
    writable: bool = False


@dataclass(slots=True)
class Inode(Record):
    """The file of an overlay, and its inode in the upper."""

    place: int = NONE
    dirty: bool = False
    wb_err: int = 0
    lost: bool = False
    """ghost: a write was lost, and nobody was told by fsync"""
    evicted: bool = False
    """ghost: and the inode was evicted since"""


@dataclass(slots=True)
class Seen(Record):
    """Ghost of an overlay."""

    struck: bool = False
    """an error was recorded since the mount"""
    waiting: bool = False
    """and nobody in this overlay was told of the last by syncfs"""
    lost: bool = False
    """a write of this overlay was lost, and nobody in it was told"""
    mine: bool = False
    """one of the errors since the mount was a write of this overlay"""
    orphan: bool = False
    """its server died before somebody was told"""
    later: bool = False
    """an error was recorded since its superblock was remounted read-only"""
    unsure: bool = False
    """and somebody was told there, of that one or of one before it"""


@dataclass(slots=True)
class Party(Record):
    """The host, or an overlay (with its container): the two fields of the first three that differ say which."""

    host: bool = False
    volatile: bool = False
    mounted: bool = False
    read_only: bool = False
    """whether the superblock was remounted so"""
    s_wb_err: int = 0
    """the cursor of the overlay's own superblock"""
    mark: int = 0
    """what the design sampled of the upper's cursor at the mount"""
    mounted_at: int = 0
    """overt, the guard: the account, `overt.ledger.Account`"""
    reached: int = 0
    files: list[File] = field(default_factory=list)
    inode: Inode = field(default_factory=Inode)
    seen: Seen = field(default_factory=Seen)


@dataclass(slots=True)
class Upper(Record):
    """The superblock that all overlays have their upper directories on."""

    s_wb_err: int = 0
    errors: int = 0
    """how many were recorded so far: a scope has a limit"""
    state: int = ALIVE
    mounts: int = 0
    """overt, the guard: how many overlays it has on it"""
    recorded: int = 0
    """overt, the guard: how many errors its ledger has recorded"""
    unread: bool = False
    """overt, the guard: whether there was an error since its eyes looked last"""
    host_told: bool = False
    """ghost: somebody on the host was told of the last error"""
    container_told: bool = False
    """ghost: somebody in a container was"""


def _write_out(kind: type[Record]) -> None:
    """Give a record its `copy` and `key`, with every field in its place, as dataclasses do with __init__."""
    copies, keys = [], []
    for one in fields(kind):  # type: ignore[arg-type]
        if one.type in (int, bool):
            copy = key = f"self.{one.name}"
        elif one.type in (Asked, Inode, Seen):
            copy, key = f"self.{one.name}.copy()", f"self.{one.name}.key()"
        else:
            copy = f"[item.copy() for item in self.{one.name}]"
            key = f"tuple([item.key() for item in self.{one.name}])"
        copies.append(copy)
        keys.append(key)
    for name, text in (("copy", f"kind({', '.join(copies)})"), ("key", f"({', '.join(keys)},)")):
        setattr(kind, name, eval(f"lambda self: {text}", {"kind": kind}))


for _kind in (Asked, File, Inode, Seen, Party, Upper):
    _write_out(_kind)
