"""The filesystems under the overlays: one row each."""

from collections.abc import Mapping
from typing import NamedTuple


class Upper(NamedTuple):
    filesystem: str
    """a row of overt.lab.FILESYSTEMS"""
    mount_options: str = ""


UPPERS: Mapping[str, Upper] = {
    "ext4": Upper("ext4"),
    "ext4-nojournal": Upper("ext4-nojournal"),
    "ext4-data-journal": Upper("ext4", "data=journal"),
    "xfs": Upper("xfs"),
    "btrfs": Upper("btrfs"),
}
