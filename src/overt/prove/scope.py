"""How much of the world is looked at: who is there, what can happen to them, how often.

The use cases fall into four groups that hardly touch: what syncfs says depends on no file's cursor, and what fsync says
on an ordinary mount on no superblock's. A scope has the verbs of one group, and what no verb of it reads is left out,
so that the histories of each can be visited to the last. (`whole` has all of them, on a smaller world; a test
compares.)
"""

from collections.abc import Iterator, Mapping
from itertools import combinations_with_replacement
from typing import NamedTuple

from overt.prove.world import LOWER, NONE, Asked, File, Inode, Party, Seen, Upper


class Bound(NamedTuple):
    """Limits of a scope."""

    overlays: int = 2
    fds: int = 2
    """open files of each overlay at a time, and of the host where that is asked about"""
    errors: int = 2

    def is_below(self, other: "Bound") -> bool:
        """Whether it has less of something, so that what needs that cannot come up."""
        return any(mine < least for mine, least in zip(self, other, strict=True))

    def __str__(self) -> str:
        overlays, fds, errors = map(_count, self, ("overlay", "fd", "error"))
        return f"{overlays} and a host, {fds} each, {errors}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


DEFAULT, DEEP = Bound(), Bound(3, 3, 3)


class Scope(NamedTuple):
    """A row of SCOPES."""

    name: str
    overlay: tuple[str, ...]
    """verbs, in the order in which they are tried"""
    host: tuple[str, ...]
    files: bool = False
    """whether overlays have a file whose cursor matters"""
    fds: int | None = None
    """None: as the bound says"""
    host_fds: int | None = None

    def start(self, bound: Bound, kinds: tuple[bool, ...]) -> tuple[Upper, list[Party]]:
        """The world before anything happened; `kinds` says of each overlay whether it is volatile."""
        fds = bound.fds if self.fds is None else self.fds
        host_fds = bound.fds if self.host_fds is None else self.host_fds
        place = LOWER if self.files else NONE
        overlays = [
            Party(volatile=kind, files=[File() for _ in range(fds)], inode=Inode(place=place)) for kind in kinds
        ]
        return Upper(), [*overlays, Party(host=True, mounted=True, files=[File() for _ in range(host_fds)])]

    def project_party(self, party: Party) -> None:
        """Leave out what no verb of this scope reads (and so no claim about one of them).

        With fsync alone: an ordinary mount asks the file's cursor, a volatile one its superblock's or the upper's.
        """
        if "msync" not in self.overlay:
            for file in party.files:
                file.msync, file.f_map_err = Asked(), 0
        if "syncfs" in self.overlay:
            return
        party.seen.waiting = party.seen.lost = party.seen.orphan = False
        for file in party.files:
            file.syncfs = Asked()
            if not party.host:
                file.f_sb_err = file.known = 0
                file.held = False
            if party.volatile:
                file.fsync, file.msync, file.f_wb_err, file.f_map_err = Asked(), Asked(), 0, 0
        if party.volatile:
            party.inode.wb_err, party.inode.lost, party.inode.evicted = 0, False, False
        else:
            party.seen = Seen()
            party.s_wb_err = party.mark = party.mounted_at = party.reached = 0

    def project_upper(self, upper: Upper, kinds: tuple[bool, ...]) -> None:
        """The same for the upper. fsync asks its cursor on volatile mounts only."""
        if "syncfs" in self.overlay:
            return
        upper.host_told = upper.container_told = False
        if not any(kinds):
            upper.s_wb_err = upper.recorded = 0
            upper.unread = False


_MOUNT = ("mount", "umount")

SCOPES: Mapping[str, Scope] = {
    scope.name: scope
    for scope in (
        Scope("syncfs", (*_MOUNT, "open", "syncfs", "close"), ("lose", "open", "syncfs", "close")),
        Scope(
            "fsync",
            (
                *("mount", "open", "open_write", "copy_fails", "write", "lose", "write_back"),
                *("fsync", "fsync_dir", "close", "evict"),
            ),
            ("lose", "open", "syncfs"),
            files=True,
            host_fds=1,
        ),
        Scope(
            "msync",
            ("mount", "open_write", "write", "lose", "write_back", "fsync", "msync", "close", "evict"),
            (),
            files=True,
            host_fds=0,
        ),
        Scope(
            "data",
            (*_MOUNT, "open_write", "write", "lose", "write_back", "syncfs", "close", "die"),
            ("lose", "open", "syncfs"),
            fds=1,
            host_fds=1,
        ),
        Scope(
            "remount",
            (*_MOUNT, "remount_ro", "remount_rw", "open", "syncfs", "close"),
            ("lose", "lose_space", "open", "syncfs"),
            fds=1,
            host_fds=1,
        ),
        Scope("abort", ("mount", "open", "syncfs", "fsync_dir"), ("abort", "open", "syncfs"), fds=1, host_fds=1),
    )
}

WHOLE = Scope(
    "whole",
    (
        *_MOUNT,
        *("remount_ro", "remount_rw", "open", "open_write", "copy_fails", "write", "lose", "lose_space", "write_back"),
        *("syncfs", "fsync", "msync", "fsync_dir", "close", "evict", "die"),
    ),
    ("lose", "lose_space", "open", "syncfs", "close"),
    files=True,
)


def mixes(overlays: int) -> Iterator[tuple[bool, ...]]:
    """Every mix of ordinary (False) and volatile (True) overlays, up to their order."""
    return combinations_with_replacement((False, True), overlays)
