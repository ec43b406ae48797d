"""A mount, told from whatever else is mounted, at the same place or not.

By its id, because a filesystem that has shut down may not even answer stat(2) on its root; mountinfo needs no answer
from any filesystem (proc_pid_mountinfo(5)). The kernel gives the id of a mount that has gone to the next one, so that
the device goes with it, which the keeper holds: its number for most filesystems, its path for btrfs, whose own number
is as fleeting as the id.
"""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple, Self

from overt.host import mounts


class Place(NamedTuple):
    id: str
    number: str  # major:minor
    kind: str
    source: str

    @classmethod
    def of(cls, path: str) -> Self:
        """The mount whose root `path` is."""
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            with open(f"/proc/self/fdinfo/{fd}", encoding="utf-8") as file:
                number = next(line.split()[1] for line in file if line.startswith("mnt_id:"))
        finally:
            os.close(fd)
        return next(place for place, _ in cls._all() if place.id == number)

    @property
    def is_there(self) -> bool:
        """Whether it is still mounted, wherever that is by now."""
        return any(place == self for place, _ in self._all())

    def unmount(self) -> None:
        """Detach it, and what is stacked on it, wherever it is by now: a directory above it may have another name.

        Nothing to do if it is not there any more.
        """
        while (point := next((point for place, point in self._all() if place == self), None)) is not None:
            mounts.umount(point, mounts.MNT_DETACH)

    @classmethod
    def _all(cls) -> Iterator[tuple[Self, bytes]]:
        """All mounts, and where each is."""
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
        for line in lines:
            place, _, filesystem = line.partition(" - ")
            number, _, device, _, point, *_ = place.split(" ")
            kind, source, *_ = filesystem.split(" ")
            yield cls(number, device, kind, source), _unescaped(point)


def _unescaped(path: str) -> bytes:
    r"""As it was before mountinfo wrote \040 for a space."""
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), path.encode("utf-8", "surrogateescape"))
