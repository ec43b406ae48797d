"""The rows of the table: one entry for each thing measured, read by the runner, the table, JSON and `--only`.

Every row has a value for each system, and a ratio is always "how many times better": above 1 the system that is looked
at is faster (or smaller) than the peer, below 1 it is slower, whichever way the unit counts.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

_PEER: Mapping[str, float] = MappingProxyType({"fuse-overlayfs": 1.0})
_DATA: Mapping[str, float] = MappingProxyType({"fuse-overlayfs": 1.0, "kernel": 0.9})
_NONE: Mapping[str, float] = MappingProxyType({})


class Row(NamedTuple):
    """One line of the table."""

    name: str
    title: str
    unit: str
    more_is_better: bool = False
    ratios: Mapping[str, float] = _PEER
    """The least ratio that is good enough, by peer; below it the row is marked."""
    most: float | None = None
    """The largest value that is good enough, in the row's unit."""
    above_plain: float | None = None
    """How far above the plain filesystem's the value may be, in the row's unit."""
    note: str = ""


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("create", "create, write 4 KiB, close", "us"),
        Row("open", "open, read 4 KiB, close", "us"),
        Row("stat-changed", "stat after a write", "us"),
        Row("unlink", "unlink", "us"),
        Row("stat", "lower file: stat, cold", "us"),
        Row("open-lower", "lower file: open, read, close", "us"),
        Row("ls-cold", "ls -lR, merged, first", "ms"),
        Row("ls-warm", "ls -lR, merged, again", "ms"),
        Row("untar", "untar", "ms"),
        Row("rm", "rm -rf of that tree", "ms"),
        Row("git-cold", "git status, first", "ms"),
        Row("git-warm", "git status, again", "ms"),
        Row("rand-write", "4 KiB random write", "MiB/s", more_is_better=True, ratios=_DATA),
        Row("rand-read", "4 KiB random read", "MiB/s", more_is_better=True, ratios=_DATA),
        Row("seq-write", "1 MiB sequential write", "MiB/s", more_is_better=True, ratios=_DATA),
        Row("seq-read", "1 MiB sequential read", "MiB/s", more_is_better=True, ratios=_DATA),
        Row(
            "first-write", "first write to a lower file", "ms",
            note="plain: the same bytes copied by cp; plain and fuse-overlayfs do not fsync the copy, the others do",
        ),
        Row("fsync-clean", "fsync, nothing to write", "us"),
        Row("fsync", "fsync after 4 KiB written", "us"),
        Row(
            "syncfs-clean", "syncfs, nothing to write", "us", ratios=_NONE, above_plain=300.0,
            note="fuse-overlayfs is never asked: the kernel answers 0, and nothing reaches the disk",
        ),
        Row("syncfs", "syncfs after 4 KiB written", "us", ratios=_NONE, note="fuse-overlayfs: as above"),
        Row("mounts", "start and mount many", "s", most=5.0),
        Row("memory", "memory of all servers (Pss)", "MiB", most=64.0),
        Row("idle", "CPU used in 2 s of idling", "s", ratios=_NONE, most=0.005),
    )
}  # fmt: skip
