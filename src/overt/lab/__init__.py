"""Disks that fail on demand: `with Disk("ext4") as disk`. See overt.lab.disk."""

from overt.lab.disk import Disk
from overt.lab.filesystems import FILESYSTEMS
from overt.lab.image import Counters

__all__ = ["FILESYSTEMS", "Counters", "Disk"]
