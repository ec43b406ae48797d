"""A mount, told from whatever else is mounted at the same place.

By its id, because a filesystem that has shut down may not even answer stat(2) on its root; mountinfo needs no answer
from any filesystem (proc_pid_mountinfo(5)).
"""

import os
from typing import NamedTuple, Self

from overt.host import mounts


class Place(NamedTuple):
    id: str
    point: str  # as mountinfo writes it

    @classmethod
    def of(cls, path: str) -> Self:
        """The mount whose root `path` is."""
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            with open(f"/proc/self/fdinfo/{fd}") as file:
                number = next(line.split()[1] for line in file if line.startswith("mnt_id:"))
        finally:
            os.close(fd)
        return next(place for place in map(cls._read, _mountinfo()) if place.id == number)

    def unmount(self, path: str) -> None:
        """Detach it, and what is stacked on it, from `path`; nothing to do if it is not there any more."""
        while any(self._read(line) == self for line in _mountinfo()):
            mounts.umount(path, mounts.MNT_DETACH)

    @classmethod
    def _read(cls, line: str) -> Self:
        fields = line.split(" ")
        return cls(fields[0], fields[4])


def _mountinfo() -> list[str]:
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        return file.read().splitlines()
