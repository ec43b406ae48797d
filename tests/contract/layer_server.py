"""A layer that is a network filesystem, as far as it matters: a FUSE server of one directory of files, all of them
holding `BODY`, in which every close(2) fails as soon as `failing` exists.
"""

import os
import signal
import stat
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EIO, ENOENT, ENOSYS
from pathlib import Path

from overt.fuse.attr import validity
from overt.fuse.directory import DirBuffer
from overt.fuse.request import Refused, Request
from overt.fuse.session import Session
from overt.host import mounts, process
from overt.wire import fuse
from overt.wire.record import pack

BODY = b"of a layer that is far away\n" * 1000
NAMES = [b"file%d" % number for number in range(20)]
_VALID = validity(10**9, 10**9)
_ROOT = fuse.FUSE_ROOT_ID


def _attr(number: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if number == _ROOT else stat.S_IFREG | 0o644
    return pack(
        fuse.Attr(
            ino=number, size=len(BODY), blocks=64, atime=0, mtime=0, ctime=0, atimensec=0, mtimensec=0, ctimensec=0,
            mode=mode, nlink=1, uid=0, gid=0, rdev=0, blksize=4096, flags=0,
        )
    )  # fmt: skip


def _answer(session: Session, request: Request, failing: Path) -> bytes | memoryview | None:
    unique, opcode, number = request.unique, request.opcode, request.nodeid
    if opcode == fuse.FUSE_INIT:
        return session.init(request)
    if opcode == fuse.FUSE_LOOKUP:
        if request.name not in NAMES:
            return session.error(unique, ENOENT)
        number = 2 + NAMES.index(request.name)
        return session.entry(unique, number, 0, _VALID, _attr(number))
    if opcode == fuse.FUSE_GETATTR:
        return session.attr(unique, _VALID, _attr(number))
    if opcode in (fuse.FUSE_OPEN, fuse.FUSE_OPENDIR):
        return session.opened(unique, number)
    if opcode == fuse.FUSE_READ:
        offset, size = request.arg[1:3]
        return session.data(unique, BODY[offset : offset + size])
    if opcode == fuse.FUSE_READDIR:
        entries = DirBuffer(request.arg[2])
        for index, name in list(enumerate(NAMES))[request.arg[1] :]:
            if not entries.add(2 + index, index + 1, stat.S_IFREG >> 12, name):
                break
        return session.directory(unique, entries)
    if opcode == fuse.FUSE_FLUSH:
        return session.error(unique, EIO) if failing.exists() else session.empty(unique)
    if opcode in (fuse.FUSE_RELEASE, fuse.FUSE_RELEASEDIR):
        return session.empty(unique)
    if opcode == fuse.FUSE_STATFS:
        return session.statfs(unique, fuse.Kstatfs(1000, 0, 0, 1000, 0, 4096, 255, 4096))
    return None if opcode in (fuse.FUSE_FORGET, fuse.FUSE_BATCH_FORGET) else session.error(unique, ENOSYS)


def _serve(device: int, failing: Path) -> None:
    session = Session(0, 1 << 16, lambda line: None)
    buffer = bytearray(session.buffer_size)
    while True:
        try:
            size = os.readv(device, [buffer])
        except OSError as error:
            if error.errno == ENOENT:  # taken back before we had it
                continue
            return
        try:
            reply = _answer(session, session.decode(buffer, size), failing)
        except Refused as refusal:
            reply = refusal.reply
        if reply:
            os.write(device, reply)


@contextmanager
def layer(place: Path) -> Iterator[Path]:
    """The layer, mounted at `place`/far; the file to be made for closes to fail."""
    failing, point = place / "failing", place / "far"
    point.mkdir()
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options: list[tuple[str, str | int | None]] = [
        ("source", "far"), ("fd", str(device)), ("rootmode", "40755"), ("user_id", "0"), ("group_id", "0"),
        ("allow_other", None),
    ]  # fmt: skip
    fd = mounts.new_mount("fuse", options)
    pid = os.fork()
    if pid == 0:
        try:
            process.die_with_parent(signal.SIGKILL)
            os.close(fd)
            _serve(device, failing)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(device)
    mounts.attach(fd, point)
    os.close(fd)
    try:
        yield failing
    finally:
        mounts.umount(point, mounts.MNT_DETACH)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
