"""The process that answers for a disk: a FUSE server whose whole filesystem is one regular file, the image.

The mount's root is that file (rootmode S_IFREG), so there is no name to look up, and a handful of opcodes is all there
is. One thread answers everything in turn, and each answer is a copy in memory; that keeps up with a real SSD.

It lives in a mount namespace of its own with next to nothing in it. When the last process of a namespace ends, the
namespace's mounts are flushed before the process's own descriptors are let go; were this disk's filesystem among them,
the server would wait for an answer that only it could give. And a copied namespace holds on to other disks' mounts.

What the server must never do is wait for anything but a request. If it is killed, the kernel aborts the connection and
every user of the disk gets an error at once.
"""

import errno
import os
import select
import stat
import time
from collections.abc import Callable
from typing import Any

from overt.host import mounts, process
from overt.lab.channel import Channel
from overt.lab.image import MEANING, Image, Rule
from overt.lab.recording import Recorder
from overt.wire import fuse
from overt.wire.record import pack, size_of, struct_of

MAX_WRITE = 1 << 20
_WANTED = fuse.FUSE_ASYNC_READ | fuse.FUSE_BIG_WRITES | fuse.FUSE_ASYNC_DIO | fuse.FUSE_MAX_PAGES

_IN = struct_of(fuse.InHeader).unpack_from
_IN_SIZE = size_of(fuse.InHeader)
_OUT = struct_of(fuse.OutHeader).pack
_OUT_SIZE = size_of(fuse.OutHeader)
_READ = struct_of(fuse.ReadIn).unpack_from
_WRITE = struct_of(fuse.WriteIn).unpack_from
_WRITE_SIZE = size_of(fuse.WriteIn)
_FALLOCATE = struct_of(fuse.FallocateIn).unpack_from
_INIT = struct_of(fuse.InitInCompat).unpack_from

_SILENT = frozenset({fuse.FUSE_FORGET, fuse.FUSE_BATCH_FORGET, fuse.FUSE_INTERRUPT})
_FOR_EVER = 1 << 32  # seconds
_BURST = 64  # requests answered before the control channel gets its turn


def main(device: int, control: Channel, image: Image, owner: int) -> None:
    """Serve until the user or the connection is gone. `device`: /dev/fuse, non-blocking; `owner`: the user's pid."""
    process.unshare(process.CLONE_NEWNS)
    mounts.make_private()
    try:
        owner_status = os.open(f"/proc/{owner}/status", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # it did not live to see its disk
        return
    mounts.umount("/", mounts.MNT_DETACH)
    Server(device, control, image, owner_status).run()


class Server:
    def __init__(self, device: int, control: Channel, image: Image, owner_status: int) -> None:
        self._device = device
        self._control = control
        self._image = image
        self._owner_status = owner_status
        self._buffer = bytearray(MAX_WRITE + 4096)
        self._view = memoryview(self._buffer)
        self._hung_until = 0.0
        self._poller = select.poll()
        self._verbs: dict[str, Callable[..., Any]] = {
            "fail": self._fail,
            "heal": self._image.rules.clear,
            "hang": self._hang,
            "resume": self._resume,
            "counters": self._image.counters,
            "snapshot": self._snapshot,
            "record": self._record,
            "recorded": self._recorded,
        }
        self._handlers: dict[int, Callable[[], bytes | memoryview]] = {
            fuse.FUSE_INIT: self._init,
            fuse.FUSE_GETATTR: self._getattr,
            fuse.FUSE_OPEN: self._open,
            fuse.FUSE_READ: self._read,
            fuse.FUSE_WRITE: self._write,
            fuse.FUSE_FSYNC: self._fsync,
            fuse.FUSE_FALLOCATE: self._fallocate,
            fuse.FUSE_STATFS: self._statfs,
            fuse.FUSE_RELEASE: lambda: b"",
            fuse.FUSE_DESTROY: lambda: b"",
        }

    def run(self) -> None:
        self._poller.register(self._control, select.POLLIN)
        self._poller.register(self._device, select.POLLIN)
        control = self._control.fileno()
        while True:
            for fd, _ in self._poller.poll(self._until_next_look()):
                if fd == control:
                    if not self._control.serve(self._verbs):
                        return
                elif not self._answer_burst():
                    return
            if self._hung_until and not self._still_hung():
                return

    # What the user asks for.

    def _fail(self, what: str, code: int, marker: str, start: int, end: int | None, skip: int) -> None:
        last = self._image.size if end is None else end
        without = what == "metadata"
        self._image.rules.append(Rule(MEANING[what], code, bytes.fromhex(marker), start, last, without, skip))

    def _hang(self, limit: float) -> None:
        if not self._hung_until:
            self._poller.unregister(self._device)
        self._hung_until = time.monotonic() + limit

    def _resume(self) -> None:
        if self._hung_until:
            self._poller.register(self._device, select.POLLIN)
        self._hung_until = 0.0

    def _snapshot(self, fds: list[int], durable: bool) -> None:
        self._image.dump(fds[0], durable=durable)

    def _record(self, fds: list[int]) -> None:
        if self._image.recorder:
            self._image.recorder.close()
        self._image.dump(fds[0], durable=False)
        self._image.recorder = Recorder(fds[1])

    def _recorded(self) -> int:
        return self._image.recorder.size if self._image.recorder else 0

    def _until_next_look(self) -> float | None:
        """Milliseconds; None: nothing to look at but what comes in."""
        return min(1000, 1000 * max(0.0, self._hung_until - time.monotonic())) if self._hung_until else None

    def _still_hung(self) -> bool:
        """Resume when the time is up. False: the user was killed while it waits for this very disk.

        Such a process cannot end, so neither does its end of the channel close: the signal stays pending.
        """
        if time.monotonic() > self._hung_until:
            self._resume()
        try:
            status = os.pread(self._owner_status, 8192, 0)
        except ProcessLookupError:
            return False
        kill = 1 << 8
        pending = [line.split()[1] for line in status.splitlines() if line.startswith((b"SigPnd:", b"ShdPnd:"))]
        return not any(int(mask, 16) & kill for mask in pending)

    # What the kernel asks for.

    def _answer_burst(self) -> bool:
        """False: the connection is gone."""
        for _ in range(_BURST):
            try:
                os.readv(self._device, [self._buffer])
            except BlockingIOError:
                return True
            except OSError as error:
                if error.errno == errno.ENOENT:  # the request was taken back before we had it
                    continue
                if error.errno == errno.ENODEV:
                    return False
                raise
            _, opcode, unique, *_ = _IN(self._buffer)
            if opcode in _SILENT:
                continue
            handler = self._handlers.get(opcode)
            code, body = 0, memoryview(b"")
            try:
                if handler is None:
                    code = errno.ENOSYS  # the kernel remembers, and does without
                else:
                    body = memoryview(handler())
            except OSError as error:
                code = error.errno or errno.EIO
            try:
                os.writev(self._device, [_OUT(_OUT_SIZE + len(body), -code, unique), body])
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV):  # nobody waits for this answer any more
                    raise
        return True

    def _init(self) -> bytes:
        _, minor, readahead, offered = _INIT(self._buffer, _IN_SIZE)
        return pack(
            fuse.InitOut(
                major=fuse.FUSE_KERNEL_VERSION,
                minor=min(minor, 38),
                max_readahead=readahead,
                flags=_WANTED & offered,
                max_background=64,
                congestion_threshold=48,
                max_write=MAX_WRITE,
                time_gran=1,
                max_pages=MAX_WRITE // 4096,
                map_alignment=0,
                flags2=0,
                max_stack_depth=0,
                request_timeout=0,
            )
        )

    def _getattr(self) -> bytes:
        size = self._image.size
        attr = fuse.Attr(
            ino=fuse.FUSE_ROOT_ID, size=size, blocks=size // 512, atime=0, mtime=0, ctime=0, atimensec=0, mtimensec=0,
            ctimensec=0, mode=stat.S_IFREG | 0o600, nlink=1, uid=0, gid=0, rdev=0, blksize=4096, flags=0,
        )  # fmt: skip
        return pack(fuse.AttrOut(attr_valid=_FOR_EVER, attr_valid_nsec=0, attr=attr))

    def _open(self) -> bytes:
        how = fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES | fuse.FOPEN_NOFLUSH
        return pack(fuse.OpenOut(fh=0, open_flags=how, backing_id=0))

    def _read(self) -> memoryview:
        _, offset, size, *_ = _READ(self._buffer, _IN_SIZE)
        return self._image.read(offset, size)

    def _write(self) -> bytes:
        _, offset, size, *_ = _WRITE(self._buffer, _IN_SIZE)
        begin = _IN_SIZE + _WRITE_SIZE
        self._image.write(offset, self._view[begin : begin + size])
        return pack(fuse.WriteOut(size))

    def _fsync(self) -> bytes:
        self._image.flush()
        return b""

    def _fallocate(self) -> bytes:
        _, offset, length, _ = _FALLOCATE(self._buffer, _IN_SIZE)
        self._image.discard(offset, length)  # the loop driver knows PUNCH_HOLE and ZERO_RANGE: zeros, both
        return b""

    def _statfs(self) -> bytes:
        blocks = self._image.size // 4096
        st = fuse.Kstatfs(blocks=blocks, bfree=0, bavail=0, files=1, ffree=0, bsize=4096, namelen=255, frsize=4096)
        return pack(fuse.StatfsOut(st))
