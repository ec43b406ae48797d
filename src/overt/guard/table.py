"""Which overlay a descriptor of a container's is of, found out without touching the file.

The file may be of a FUSE filesystem whose server never answers, the container's own. So it is neither opened nor
borrowed: fstatfs(2) would ask the server, and so would close(2). statx(2) with AT_STATX_DONT_SYNC, through
/proc/TID/fd/N, asks nobody and gives the mount's id. That is remembered: an id belongs to one mount for ever. What the
mount is, is in the mountinfo of the thread, or, after a chroot, in that of the container's first process. While that is
looked for, an O_PATH descriptor of ours, for which nobody is asked either, is the file: another thread may put another
one at N at any time, and the number of a mount in mountinfo is given away again when it has ended.
"""

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from overt.host import files

FULL = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""nothing more can be opened: this says nothing of what was to be"""
_MOST = 1 << 16
"""mounts remembered; a container can make any number"""


class Mounted(NamedTuple):
    """A mount, and the superblock behind it, as mountinfo has them (proc_pid_mountinfo(5))."""

    device: int
    """the superblock's number"""
    point: bytes
    """from the root of the process that was asked"""
    upperdir: bytes
    """of an overlay, as whoever mounted it said; empty: nothing can be written to it"""
    workdir: bytes
    volatile: bool
    id: int = 0
    """the mount's, which no other has had or will have (STATX_MNT_ID_UNIQUE); 0 where it was not asked for"""

    @property
    def lies(self) -> bool:
        """Whether the kernel's own answer to syncfs(2) may be wrong: an ordinary overlay's with an upper."""
        return bool(self.upperdir and self.workdir) and not self.volatile


class Unknown(Exception):
    """Which mount it is has to be looked for."""


def read(pid: int) -> dict[int, Mounted]:
    """The mounts that a process sees, by the id that mountinfo gives them. OSError if it is gone."""
    return dict(map(_parse, _mountinfo(pid).split(b"\n")[:-1]))


class Walk:
    """What is remembered while the descriptors of many processes are asked about, one process after another."""

    def __init__(self) -> None:
        self.nowhere: set[tuple[int, int]] = set()
        """mounts that a thread does not see, by its id and the mount's; others may see them"""
        self._tid = 0
        self._text = b""

    def mountinfo(self, tid: int) -> bytes:
        """What thread `tid` sees, or saw when it was first asked about. OSError if it is gone."""
        if self._tid != tid:
            self._text, self._tid = _mountinfo(tid), tid
        return self._text


class Table:
    """Mounts that were asked about. Any thread may use it."""

    def __init__(self) -> None:
        self._known: dict[int, Mounted] = {}
        self._internal = _internal()

    def known(self, place: bytes) -> Mounted | int:
        """The mount that the descriptor `place` (/proc/TID/fd/N) is on, or st_dev, if that is remembered.

        Takes the same short time whatever mounts there are. Raises Unknown, and OSError: ENOENT without such a
        descriptor or process.
        """
        try:
            where = files.whereabouts(place)
        except PermissionError:
            raise Unknown from None
        found = self._remembered(where)
        if found is None:
            raise Unknown
        return found

    def mount_of(self, place: bytes, pids: Iterable[int]) -> Mounted | int:
        """The mount that the descriptor `place` is on, remembered or looked for in what `pids` see.

        Where none of them sees it (a pipe; a detached mount), the file's st_dev. It takes the longer the more mounts
        they see. OSError as above, and what opening a descriptor raises.
        """
        with contextlib.suppress(Unknown):
            return self.known(place)
        with _pinned(place) as ours:
            found = _shown(ours, _mountinfos(pids))
            if isinstance(found, int):
                return found
            try:
                return self._remember(files.whereabouts(ours).mount, found)
            except PermissionError:
                return found

    def _remembered(self, where: files.Whereabouts) -> Mounted | int | None:
        found = self._known.get(where.mount)
        if found is None and where.mount in self._internal:
            return where.device
        return found

    def _remember(self, mount: int, found: Mounted) -> Mounted:
        if len(self._known) >= _MOST:
            self._known.clear()
        found = self._known[mount] = found._replace(id=mount)
        return found

    def device_of(self, place: bytes, tid: int, walk: "Walk | None" = None) -> int:
        """The superblock's number, or st_dev where thread `tid` does not see the mount. `walk`: for many questions."""
        if walk is None:
            return _device(self.mount_of(place, (tid,)))
        try:
            where = files.whereabouts(place)
        except PermissionError:
            text = walk.mountinfo(tid)
            with _pinned(place) as ours:
                return _device(_shown(ours, (text,)))
        found = self._remembered(where)
        at = tid, where.mount
        if found is None and at not in walk.nowhere:
            seen = _line(walk.mountinfo(tid), _number(place, where.mount))
            # What it saw then may have another mount with that number: not that is remembered, but what it sees now.
            seen = seen and _line(_mountinfo(tid), _number(place, where.mount))
            if seen is None:
                walk.nowhere.add(at)
            else:
                found = self._remember(where.mount, seen)
        return where.device if found is None else _device(found)

    def is_on(self, device: int, tid: int, place: bytes) -> bool:
        """Whether the descriptor is of this superblock, as thread `tid` sees it."""
        return self.device_of(place, tid) == device


def _internal() -> set[int]:
    """The kernel's own mounts, of pipes, sockets and the like: they are in nobody's mountinfo and never will be."""
    fds = [
        *os.pipe(), os.eventfd(0), socket.socket(socket.AF_UNIX).detach(), os.memfd_create("overt"),
        os.pidfd_open(os.getpid()), os.open("/proc/self/ns/mnt", os.O_RDONLY),
    ]  # fmt: skip
    try:
        return {files.whereabouts(b"/proc/self/fd/%d" % fd).mount for fd in fds}
    finally:
        for fd in fds:
            os.close(fd)


@contextlib.contextmanager
def _pinned(place: bytes) -> Iterator[bytes]:
    """A path of the file at `place` that is of this file, and its mount alive, whatever comes to be at `place`."""
    fd = os.open(place, os.O_PATH)
    try:
        yield b"/proc/self/fd/%d" % fd
    finally:
        os.close(fd)


def _number(place: bytes, mount: int) -> int:
    """What mountinfo knows a mount by, on which the file at `place` was seen. FileNotFoundError if another is there.

    It was the mount's since then. The file is held for no longer than this takes, and not while mountinfo is read:
    whoever lets go of a file last, of a mount that was detached, may wait for its filesystem.
    """
    with _pinned(place) as ours:
        if files.whereabouts(ours).mount != mount:
            raise FileNotFoundError(errno.ENOENT, "another file is there now", os.fsdecode(place))
        return files.whereabouts(ours, files.STATX_MNT_ID).mount


def _device(found: Mounted | int) -> int:
    return found if isinstance(found, int) else found.device


def _mountinfo(pid: int) -> bytes:
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        return file.read()


def _mountinfos(pids: Iterable[int]) -> Iterator[bytes]:
    for pid in pids:
        try:
            text = _mountinfo(pid)
        except OSError as error:
            if error.errno in FULL:
                raise
            continue  # it has ended
        yield text


def _line(text: bytes, number: int) -> Mounted | None:
    """The mount with this number in a mountinfo. Only its line is parsed: a container can make any number of them."""
    word = b"%d " % number
    at = 0 if text.startswith(word) else text.find(b"\n" + word) + 1
    if not text.startswith(word, at):
        return None
    return _parse(text[at : text.index(b"\n", at)])[1]


def _parse(line: bytes) -> tuple[int, Mounted]:
    left, _, right = line.partition(b" - ")
    number, _, device, _, point, *_ = left.split(b" ")
    kind, _, words = right.split(b" ", 2)
    options = dict(word.partition(b"=")[::2] for word in words.split(b",")) if kind == b"overlay" else {}
    major, minor = map(int, device.split(b":"))
    return int(number), Mounted(
        os.makedev(major, minor),
        _unescape(point),
        _unescape(options.get(b"upperdir", b"")),
        _unescape(options.get(b"workdir", b"")),
        b"volatile" in options or options.get(b"fsync") == b"volatile",
    )


def _shown(ours: bytes, mountinfos: Iterable[bytes]) -> Mounted | int:
    """The mount of a file that is pinned, by the number that fdinfo shows, else the file's st_dev.

    So it is found where statx(2) is not allowed to ask about the file, too: on a FUSE filesystem of another user's
    (fs/fuse/dir.c, fuse_getattr; nothing is refused if nothing is asked for), and an overlay that has its upper there.
    """
    with open(ours.replace(b"/fd/", b"/fdinfo/"), "rb") as info:
        number = next(int(line.split()[1]) for line in info if line.startswith(b"mnt_id:"))
    found = next(filter(None, (_line(text, number) for text in mountinfos)), None)
    return files.whereabouts(ours, 0).device if found is None else found


def _unescape(path: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), path)
