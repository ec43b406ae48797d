"""Random operations on one file, each checked against a model in memory.

    fsx.py FILE MODEL --seed N --operations N [--turns] [--reader-first] [--o-sync]

Writes, reads, shared mappings, direct I/O, holes, zeroed ranges, truncation, copies within the file, seeks to data and
holes, in random order and through several open files at once, which come and go. MODEL holds what FILE has to hold, at
most MOST bytes, with FILE's size in front; it is made if it is empty. With --turns several processes work on one FILE
and MODEL: each operation is made under a lock on MODEL, so that what one has done every other one has to see. With
--reader-first the first open file is one for reading only; with --o-sync some of those for writing have O_SYNC.

Prints one line. Exit status 1 and the last operations at the first difference. (After the idea of Apple's fsx.)
"""

import argparse
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import struct
import sys
from collections import deque
from collections.abc import Callable

MOST = 1 << 18  # bytes
BLOCK = 4096
SIZE = struct.Struct("=Q")
PUNCH, ZERO, KEEP = 0x02, 0x10, 0x01  # FALLOC_FL_*

libc = ctypes.CDLL(None, use_errno=True)


class Different(Exception):
    """The file is not what it has to be."""


class Handle:
    """An open file, and a mapping made through it as long as the file may become."""

    def __init__(self, path: str, *, direct: bool, writable: bool, sync: bool = False) -> None:
        flags = (os.O_RDWR if writable else os.O_RDONLY) | (os.O_DIRECT if direct else 0) | (os.O_SYNC if sync else 0)
        self.fd = os.open(path, flags)
        self.direct = direct
        self.writable = writable
        self.map: mmap.mmap | None = None

    def mapping(self, size: int) -> mmap.mmap | None:
        """The mapping, made if need be; None if that cannot be."""
        if self.map is None and self.writable and not self.direct:
            os.ftruncate(self.fd, MOST)  # Python maps no further than the file goes
            try:
                self.map = mmap.mmap(self.fd, MOST)
            finally:
                os.ftruncate(self.fd, size)
        return self.map

    def close(self) -> None:
        os.close(self.fd)
        if self.map is not None:
            self.map.close()


class Exerciser:
    def __init__(self, path: str, model: str, seed: int, *, reader_first: bool, o_sync: bool) -> None:
        self.path = path
        self.random = random.Random(seed)
        self.o_sync = o_sync
        self.done: deque[str] = deque(maxlen=30)
        self.count: dict[str, int] = {}
        self.model_fd = os.open(model, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self.model_fd, fcntl.LOCK_EX)
        if os.fstat(self.model_fd).st_size == 0:
            with open(path, "rb") as file:
                now = file.read()
            os.ftruncate(self.model_fd, SIZE.size + MOST)
            os.pwrite(self.model_fd, SIZE.pack(len(now)) + now, 0)
        fcntl.flock(self.model_fd, fcntl.LOCK_UN)
        self.model = mmap.mmap(self.model_fd, SIZE.size + MOST)
        self.buffer = mmap.mmap(-1, MOST)  # direct I/O wants page-aligned memory
        kinds = [(False, True), (True, True), (False, False)]
        if reader_first:
            kinds.reverse()
        self.handles = [self.open(direct=direct, writable=writable) for direct, writable in kinds]
        self.verbs: list[Callable[[], str]] = [
            self.write, self.write, self.read, self.read, self.map_write, self.map_write, self.map_read, self.map_read,
            self.direct_write, self.direct_read, self.truncate, self.punch, self.zero, self.allocate, self.copy,
            self.seek, self.stat, self.flush, self.evict, self.reopen, self.append,
        ]  # fmt: skip

    # The model

    @property
    def size(self) -> int:
        return int(SIZE.unpack_from(self.model)[0])

    def put(self, offset: int, data: bytes) -> None:
        self.model[SIZE.size + offset : SIZE.size + offset + len(data)] = data
        if data and offset + len(data) > self.size:
            SIZE.pack_into(self.model, 0, offset + len(data))

    def get(self, offset: int, length: int) -> bytes:
        end = min(self.size, offset + length)
        return self.model[SIZE.size + offset : SIZE.size + end] if offset < end else b""

    def cut(self, size: int) -> None:
        old = self.size
        if size < old:
            self.model[SIZE.size + size : SIZE.size + old] = bytes(old - size)
        SIZE.pack_into(self.model, 0, size)

    # Choices

    def open(self, *, direct: bool, writable: bool) -> Handle:
        sync = self.o_sync and writable and self.random.random() < 0.5
        return Handle(self.path, direct=direct, writable=writable, sync=sync)

    def pick(self, *, direct: bool = False, writable: bool = True) -> Handle:
        fit = [each for each in self.handles if each.direct == direct and (each.writable or not writable)]
        return self.random.choice(fit)

    def data(self, length: int) -> bytes:
        return self.random.randbytes(length)

    def within(self, limit: int, least: int = 1) -> tuple[int, int]:
        """An offset and a length that do not go beyond `limit`; a length of 0 where there is no room."""
        if limit < least:
            return 0, 0
        offset = self.random.randrange(limit - least + 1)
        return offset, self.random.randint(least, min(limit - offset, 1 << self.random.randint(4, 16)) or least)

    def compare(self, offset: int, got: bytes, length: int) -> None:
        wanted = self.get(offset, length)
        if got == wanted:
            return
        if len(got) != len(wanted):
            raise Different(f"{len(got)} bytes at {offset}, not {len(wanted)}; the size is {self.size}")
        first = next(index for index in range(len(got)) if got[index] != wanted[index])
        wrong = sum(a != b for a, b in zip(got, wanted, strict=True))
        here = slice(first, first + 8)
        raise Different(
            f"at {offset + first}: {got[here].hex()}, not {wanted[here].hex()}; {wrong} bytes of {len(got)}"
        )

    # Operations: each returns what it did

    def write(self) -> str:
        offset, length = self.within(MOST)
        data = self.data(length)
        done = os.pwrite(self.pick().fd, data, offset)
        self.put(offset, data[:done])
        return f"write {offset} +{length}"

    def append(self) -> str:
        length = min(MOST - self.size, self.random.randint(1, 3000))
        data = self.data(length)
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            self.put(self.size, data[: os.write(fd, data)])
        finally:
            os.close(fd)
        return f"append +{length}"

    def read(self) -> str:
        offset, length = self.within(MOST)
        self.compare(offset, os.pread(self.pick(writable=False).fd, length, offset), length)
        return f"read {offset} +{length}"

    def map_write(self) -> str:
        offset, length = self.within(self.size)
        mapping = self.pick().mapping(self.size)
        if not length or mapping is None:
            return "-"
        data = self.data(length)
        mapping[offset : offset + length] = data
        self.put(offset, data)
        return f"map write {offset} +{length}"

    def map_read(self) -> str:
        offset, length = self.within(self.size)
        mapping = self.pick().mapping(self.size)
        if not length or mapping is None:
            return "-"
        self.compare(offset, mapping[offset : offset + length], length)
        return f"map read {offset} +{length}"

    def blocks(self) -> tuple[int, int]:
        offset, length = self.within(MOST // BLOCK)
        return offset * BLOCK, length % 32 * BLOCK

    def direct_write(self) -> str:
        offset, length = self.blocks()
        data = self.data(length)
        self.buffer[:length] = data
        done = os.pwritev(self.pick(direct=True).fd, [memoryview(self.buffer)[:length]], offset) if length else 0
        self.put(offset, data[:done])
        return f"direct write {offset} +{length}"

    def direct_read(self) -> str:
        offset, length = self.blocks()
        done = os.preadv(self.pick(direct=True).fd, [memoryview(self.buffer)[:length]], offset) if length else 0
        self.compare(offset, self.buffer[:done], length)
        return f"direct read {offset} +{length}"

    def truncate(self) -> str:
        size = self.random.randrange(MOST)
        if self.random.random() < 0.5:
            os.ftruncate(self.pick().fd, size)
        else:
            os.truncate(self.path, size)
        self.cut(size)
        return f"truncate {size}"

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        fd = self.pick().fd
        if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)) == 0:
            return True
        code = ctypes.get_errno()
        if code == errno.EOPNOTSUPP:
            return False
        raise OSError(code, f"fallocate {mode} {offset} +{length}: {os.strerror(code)}")

    def punch(self) -> str:
        offset, length = self.within(MOST)
        if self._fallocate(PUNCH | KEEP, offset, length):
            self.put(offset, bytes(len(self.get(offset, length))))
        return f"punch {offset} +{length}"

    def zero(self) -> str:
        offset, length = self.within(MOST)
        if not self._fallocate(ZERO, offset, length):
            return "-"
        self.put(offset, bytes(length))
        return f"zero {offset} +{length}"

    def allocate(self) -> str:
        offset, length = self.within(MOST)
        keep = self.random.choice((0, KEEP))
        if self._fallocate(keep, offset, length) and not keep and offset + length > self.size:
            self.cut(offset + length)
        return f"allocate {offset} +{length} {'keep' if keep else ''}"

    def copy(self) -> str:
        source, length = self.within(self.size)
        target = self.random.randrange(MOST - length + 1)
        if not length or abs(source - target) < length:
            return "-"
        done = os.copy_file_range(self.pick(writable=False).fd, self.pick().fd, length, source, target)
        self.put(target, self.get(source, done))
        return f"copy {source} +{length} to {target}: {done}"

    def seek(self) -> str:
        """What is said to be a hole reads as zeros; data that is not zero is not in one."""
        fd = self.pick(writable=False).fd
        offset = self.random.randrange(self.size + 1)
        try:
            data = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = self.size
        if any(self.get(offset, data - offset)):
            raise Different(f"a hole at {offset} up to {data} that is none")
        if data < self.size:
            hole = os.lseek(fd, data, os.SEEK_HOLE)
            if not data < hole <= self.size:
                raise Different(f"data at {data} up to a hole at {hole}; the size is {self.size}")
        return f"seek {offset}: {data}"

    def stat(self) -> str:
        found = {os.stat(self.path).st_size, *(os.fstat(each.fd).st_size for each in self.handles)}
        if found != {self.size}:
            raise Different(f"stat says {found}; the size is {self.size}")
        return "stat"

    def flush(self) -> str:
        handle = self.pick()
        verb = self.random.choice((os.fsync, os.fdatasync, self._msync))
        verb(handle.fd)
        return "flush"

    def _msync(self, fd: int) -> None:
        for each in self.handles:
            if each.map is not None and self.size:
                each.map.flush(0, -(-self.size // BLOCK) * BLOCK)

    def evict(self) -> str:
        os.posix_fadvise(self.pick(writable=False).fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return "evict"

    def reopen(self) -> str:
        """A new open file for one of the old ones, which is closed before or after."""
        index = self.random.randrange(len(self.handles))
        old = self.handles[index]
        if self.random.random() < 0.5:
            old.close()
            self.handles[index] = self.open(direct=old.direct, writable=old.writable)
        else:
            self.handles[index] = self.open(direct=old.direct, writable=old.writable)
            old.close()
        return f"reopen {index}"

    def step(self) -> None:
        verb = self.random.choice(self.verbs)
        self.done.append(f"{verb.__name__} ...")
        said = verb()
        self.done[-1] = said
        if said != "-":
            self.count[verb.__name__] = self.count.get(verb.__name__, 0) + 1


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("model")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--operations", type=int, required=True)
    parser.add_argument("--turns", action="store_true")
    parser.add_argument("--reader-first", action="store_true")
    parser.add_argument("--o-sync", action="store_true")
    arguments = parser.parse_args()
    exerciser = Exerciser(
        arguments.file, arguments.model, arguments.seed, reader_first=arguments.reader_first, o_sync=arguments.o_sync
    )
    try:
        for _ in range(arguments.operations):
            with turn(exerciser.model_fd) if arguments.turns else contextlib.nullcontext():
                exerciser.step()
        with turn(exerciser.model_fd), open(arguments.file, "rb") as file:
            exerciser.compare(0, file.read(), MOST)
    except (Different, OSError) as problem:
        print("\n".join(exerciser.done))
        print(f"seed {arguments.seed}, after {sum(exerciser.count.values())} operations: {problem!r}")
        return 1
    print(" ".join(f"{name}={count}" for name, count in sorted(exerciser.count.items())))
    return 0


@contextlib.contextmanager
def turn(fd: int):  # type: ignore[no-untyped-def]
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


if __name__ == "__main__":
    sys.exit(main())
