"""Data: with passthrough and without, of both layers, before and after copy-up."""

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from overt.host.files import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate, statx
from overt.host.libc import AT_FDCWD
from overt.wire import fuse
from overt.wire.record import unpack_from

from .ground import Ground, Layers, as_user, libc, other_ground

CONTENT = bytes(range(256)) * 100


@pytest.fixture(params=["lower", "upper"])
def file(request: pytest.FixtureRequest, data_layers: Layers) -> Path:
    """A file with content, as it is seen in the overlay."""
    (getattr(data_layers, request.param) / "file").write_bytes(CONTENT)
    return data_layers.mount() / "file"


def test_read_write_append_truncate(file: Path) -> None:
    assert file.read_bytes() == CONTENT
    with open(file, "r+b") as opened:
        opened.seek(100)
        opened.write(b"changed")
    with open(file, "ab") as opened:
        assert opened.tell() == len(CONTENT)
        opened.write(b"end")
    expected = CONTENT[:100] + b"changed" + CONTENT[107:] + b"end"
    assert file.read_bytes() == expected
    os.truncate(file, 200)
    assert file.read_bytes() == expected[:200]
    os.truncate(file, 5000)
    assert file.read_bytes() == expected[:200] + bytes(4800)
    assert os.stat(file).st_size == 5000


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY])
def test_o_trunc(file: Path, flags: int) -> None:
    os.close(os.open(file, flags | os.O_TRUNC))
    assert os.stat(file).st_size == 0
    assert file.read_bytes() == b""


def test_ftruncate(file: Path) -> None:
    with open(file, "r+b") as opened:
        os.ftruncate(opened.fileno(), 10)
        assert os.fstat(opened.fileno()).st_size == 10
        opened.seek(0)
        assert opened.read() == CONTENT[:10]
        with pytest.raises(OSError) as raised:
            os.ftruncate(opened.fileno(), -1)
        assert raised.value.errno == errno.EINVAL


def test_fallocate_and_holes(file: Path) -> None:
    size = 1 << 20
    with open(file, "r+b") as opened:
        fd = opened.fileno()
        os.posix_fallocate(fd, 0, size)
        assert os.fstat(fd).st_size == size
        assert os.fstat(fd).st_blocks * 512 >= size
        fallocate(fd, FALLOC_FL_KEEP_SIZE, size, size)
        assert os.fstat(fd).st_size == size
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 8192, 4096)
        assert os.pread(fd, 4096, 8192) == bytes(4096)
        assert os.pread(fd, 10, 0) == CONTENT[:10]


def test_seek_data_and_hole(data_layers: Layers) -> None:
    with open(data_layers.lower / "file", "wb") as made:
        made.truncate(1 << 20)
        made.seek(1 << 19)
        made.write(b"data" * 1024)
    path = data_layers.mount() / "file"
    for flags in (os.O_RDONLY, os.O_RDWR):
        fd = os.open(path, flags)
        try:
            if flags == os.O_RDONLY or not data_layers.options:  # without passthrough a writer's file has no holes
                assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 19
                assert os.lseek(fd, 1 << 19, os.SEEK_HOLE) == (1 << 19) + 4096
            assert os.lseek(fd, 0, os.SEEK_HOLE) in (0, 1 << 20)
            with pytest.raises(OSError) as raised:
                os.lseek(fd, 1 << 20, os.SEEK_DATA)
            assert raised.value.errno == errno.ENXIO
            assert os.lseek(fd, -5, os.SEEK_END) == (1 << 20) - 5
        finally:
            os.close(fd)
    assert os.stat(data_layers.upper / "file").st_blocks * 512 <= 64 << 10, "a copy-up keeps holes"


def test_copy_file_range(file: Path) -> None:
    target = file.with_name("target")
    with open(file, "rb") as source, open(target, "wb") as copy:
        assert os.copy_file_range(source.fileno(), copy.fileno(), 10_000, 100, 50) == 10_000
    assert target.read_bytes() == bytes(50) + CONTENT[100:10_100]
    with open(file, "r+b") as both:
        assert os.copy_file_range(both.fileno(), both.fileno(), 100, 0, 20_000) == 100
        assert os.pread(both.fileno(), 100, 20_000) == CONTENT[:100]


def test_mappings(file: Path) -> None:
    with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 0) as shared:
        assert shared[:256] == CONTENT[:256]
        shared[10:14] = b"MMAP"
        shared.flush()
        assert os.pread(opened.fileno(), 4, 10) == b"MMAP"
        os.pwrite(opened.fileno(), b"WRITE", 20)
        assert shared[20:25] == b"WRITE"
    assert file.read_bytes()[10:14] == b"MMAP"
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as private:
        private[0:4] = b"mine"
        assert private[10:14] == b"MMAP"
    assert file.read_bytes()[:4] == CONTENT[:4]


class Mapping:
    """A shared mapping whose descriptor is closed; Python's own keeps a duplicate."""

    def __init__(self, file: Path) -> None:
        with open(file, "r+b") as opened:
            self._size = os.fstat(opened.fileno()).st_size
            self._at = libc.mmap(
                None, self._size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, opened.fileno(), 0
            )
        time.sleep(0.1)  # the kernel says later that it is closed

    def __enter__(self) -> "Mapping":
        return self

    def __exit__(self, *_: object) -> None:
        libc.munmap(self._at, self._size)

    def store(self, data: bytes) -> None:
        """At its beginning; the page is clean afterwards, so that the next store takes the time again."""
        ctypes.memmove(self._at, data, len(data))
        assert libc.msync(self._at, self._size, 4) == 0  # MS_SYNC

    def load(self, size: int) -> bytes:
        return ctypes.string_at(self._at, size)


def test_a_mapping_outlives_its_descriptor_and_its_name(file: Path) -> None:
    with Mapping(file) as shared:
        os.unlink(file)
        shared.store(b"gone")
        assert shared.load(4) == b"gone"


def test_the_time_that_a_mapping_leaves_is_seen(file: Path) -> None:
    os.utime(file, (1_000_000_000, 1_000_000_000))
    with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 0) as shared:
        shared[0:1] = b"m"
        shared.flush()
        assert os.stat(file).st_mtime > 1_000_000_000
    assert os.stat(file).st_mtime > 1_000_000_000


def test_the_time_that_a_mapping_leaves_is_seen_when_its_descriptor_is_closed(file: Path, data_layers: Layers) -> None:
    """As with Java's FileChannel.map; a backup that goes by times would miss what was stored."""
    below = data_layers.upper / "file"
    with Mapping(file) as shared:
        for second in (1_000_000_000, 1_000_000_001):
            os.utime(file, (second, second))
            assert os.stat(file).st_mtime == second
            shared.store(b"m")
            assert os.stat(file).st_mtime == os.stat(below).st_mtime > second
    assert os.stat(file).st_mtime == os.stat(below).st_mtime
    assert is_cached(file, below)


def test_the_room_that_a_mapping_takes_is_seen_when_its_descriptor_is_closed(data_layers: Layers) -> None:
    """tar -S believes it: a file without blocks is archived as zeros."""
    file = data_layers.mount() / "new"
    file.touch()
    os.truncate(file, 1 << 20)
    assert os.stat(file).st_blocks == room_for_ls(file) == 0
    with Mapping(file) as shared:
        assert os.stat(file).st_blocks == 0
        shared.store(b"m" * 8192)
        assert os.stat(file).st_blocks >= 16
    other = file.with_name("other")
    other.touch()
    os.truncate(other, 1 << 20)
    assert room_for_ls(other) == 0
    with Mapping(other) as shared:
        shared.store(b"m" * 8192)
        assert room_for_ls(other) >= 16


def room_for_ls(file: Path) -> int:
    """In blocks, for who does not ask for the time of access, which a mapping makes the kernel ask for."""
    raw = statx(AT_FDCWD, bytes(file), 0, 0x600)  # STATX_SIZE | STATX_BLOCKS
    return unpack_from(fuse.Statx, raw).blocks


def is_cached(file: Path, below: Path) -> bool:
    """Whether the kernel asks the overlay no more, and misses a change behind its back; it may hear of an end late."""
    for second in range(100):
        shown = os.stat(file).st_mtime
        os.utime(below, (second, second))
        if os.stat(file).st_mtime == shown:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("owner", [0, 1000])
def test_what_is_closed_and_not_mapped_is_cached_again(file: Path, data_layers: Layers, owner: int) -> None:
    os.chown(file, owner, owner)
    with open(file, "r+b"):
        pass
    assert is_cached(file, data_layers.upper / "file")


@pytest.mark.parametrize("way", ["flock", "posix", "ofd"])
def test_locks_hold_between_processes(file: Path, way: str) -> None:
    program = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'r+b')\n"
        "try: fcntl.%s(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept BlockingIOError: sys.exit(9)"
    )
    ask = [sys.executable, "-c", program % ("flock" if way == "flock" else "lockf"), str(file)]
    with open(file, "r+b") as opened:
        if way == "flock":
            fcntl.flock(opened, fcntl.LOCK_EX)
        elif way == "posix":
            fcntl.lockf(opened, fcntl.LOCK_EX)
        else:
            import struct

            fcntl.fcntl(opened, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))  # F_OFD_SETLK
        assert subprocess.run(ask, timeout=30).returncode == 9
    assert subprocess.run(ask, timeout=30).returncode == 0


def test_direct_io(file: Path) -> None:
    fd = os.open(file, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 4096) as page:
            page[:] = b"d" * 4096
            assert os.pwritev(fd, [page], 4096) == 4096
            page[:] = bytes(4096)
            assert os.preadv(fd, [page], 4096) == 4096
            assert page[:] == b"d" * 4096
    finally:
        os.close(fd)
    assert file.read_bytes()[4096:8192] == b"d" * 4096


def test_flags_are_obeyed(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    with pytest.raises(OSError) as raised:
        os.write(fd, b"x")
    assert raised.value.errno == errno.EBADF
    os.close(fd)
    fd = os.open(file, os.O_WRONLY | os.O_APPEND)
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, b"appended")
    with pytest.raises(OSError) as raised:
        os.read(fd, 1)
    assert raised.value.errno == errno.EBADF
    os.close(fd)
    assert file.read_bytes() == CONTENT + b"appended"
    for flags, error in ((os.O_DIRECTORY, errno.ENOTDIR), (os.O_CREAT | os.O_EXCL, errno.EEXIST)):
        with pytest.raises(OSError) as raised:
            os.open(file, flags | os.O_RDWR)
        assert raised.value.errno == error
    with pytest.raises(OSError) as raised:
        os.open(file.parent, os.O_RDWR)
    assert raised.value.errno == errno.EISDIR


def test_large_files(file: Path) -> None:
    with open(file, "r+b") as opened:
        os.pwrite(opened.fileno(), b"far", 5 << 40)
        assert os.pread(opened.fileno(), 3, 5 << 40) == b"far"
    assert os.stat(file).st_size == (5 << 40) + 3
    os.truncate(file, 0)


# Open while it is copied up


def write(path: Path, data: bytes = b"NEW") -> None:
    """By another opener."""
    with open(path, "r+b") as opened:
        opened.write(data)


@pytest.fixture
def old(data_layers: Layers) -> Path:
    """A file that only the lower layer has."""
    (data_layers.lower / "file").write_bytes(CONTENT)
    return data_layers.mount() / "file"


def test_old_descriptors_go_on_and_new_ones_see_the_new_file(old: Path) -> None:
    fd = os.open(old, os.O_RDONLY)
    try:
        with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as mapped:
            write(old)
            assert os.pread(fd, 3, 0) in (CONTENT[:3], b"NEW")
            assert os.pread(fd, 100, 1000) == CONTENT[1000:1100]
            assert mapped[1000:1100] == CONTENT[1000:1100]
            assert old.read_bytes()[:3] == b"NEW"
            assert os.fstat(fd).st_ino == os.stat(old).st_ino
            os.fsync(fd)
            os.fchmod(fd, 0o600)
            assert os.stat(old).st_mode & 0o777 == 0o600
            write(old, b"MORE")
            assert old.read_bytes()[:4] == b"MORE"
            with open(old, "ab") as appending:
                appending.write(b"end")
            assert os.fstat(fd).st_size == len(CONTENT) + 3
    finally:
        os.close(fd)
    assert old.read_bytes() == b"MORE" + CONTENT[4:] + b"end"


WAYS: dict[str, Callable[[Path], object]] = {
    "write": write,
    "truncate": lambda path: os.truncate(path, 7),
    "create": lambda path: os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600)),
    "create and cut": lambda path: os.close(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)),
    "append": lambda path: open(path, "ab").close(),
    "chmod": lambda path: os.chmod(path, 0o755),
    "link": lambda path: os.link(path, path.with_name("second")),
    "rename": lambda path: (os.rename(path, path.with_name("moved")), os.rename(path.with_name("moved"), path)),
    "xattr": lambda path: os.setxattr(path, "user.x", b"1"),
    "utime": lambda path: os.utime(path, (1, 1)),
}
THEN: dict[str, Callable[[Path], object]] = {
    "read": lambda path: path.read_bytes(),
    "write": write,
    "create": lambda path: os.close(os.open(path, os.O_CREAT | os.O_RDWR)),
    "cut": lambda path: os.close(os.open(path, os.O_TRUNC | os.O_WRONLY)),
    "truncate": lambda path: os.truncate(path, 3),
    "stat": os.stat,
    "unlink": os.unlink,
}


@pytest.mark.parametrize("then", THEN)
@pytest.mark.parametrize("way", WAYS)
def test_no_error_whoever_copies_it_up_while_it_is_open(old: Path, way: str, then: str) -> None:
    fd = os.open(old, os.O_RDONLY)
    try:
        WAYS[way](old)
        THEN[then](old)
        assert len(os.pread(fd, 3, 0)) == 3 or os.fstat(fd).st_size < 3
        os.fstat(fd)
    finally:
        os.close(fd)


def test_running_programs_do_not_mind(data_layers: Layers) -> None:
    data_layers.lower.joinpath("sleep").write_bytes(Path("/bin/sleep").read_bytes())
    data_layers.lower.joinpath("sleep").chmod(0o755)
    program = data_layers.mount() / "sleep"
    running = subprocess.Popen([program, "100"])
    try:
        os.chmod(program, 0o700)  # a copy-up of a text that is executed
        subprocess.run([program, "0"], check=True, timeout=30)
        if data_layers.options:  # with passthrough the text that runs is the lower file, which nobody writes to
            with pytest.raises(OSError) as raised:
                write(program, b"\x7fELF")
            assert raised.value.errno == errno.ETXTBSY
        os.rename(program, program.with_name("renamed"))
        subprocess.run([program.with_name("renamed"), "0"], check=True, timeout=30)
        assert running.poll() is None
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    write(program.with_name("renamed"), b"\x7fELF")
    subprocess.run([program.with_name("renamed"), "0"], check=True, timeout=30)


def test_opened_again_without_a_name(old: Path) -> None:
    """/proc/self/fd: there is nothing that the kernel could look up again."""
    fd, path_fd = os.open(old, os.O_RDONLY), os.open(old, os.O_PATH)
    try:
        write(old)
        for number in (fd, path_fd):
            again = os.open(f"/proc/self/fd/{number}", os.O_RDONLY)
            assert os.pread(again, 3, 0) == b"NEW"
            os.close(again)
        assert old.read_bytes()[:3] == b"NEW"
    finally:
        os.close(fd)
    again = os.open(f"/proc/self/fd/{path_fd}", os.O_RDWR)  # nobody reads the lower file any more
    os.pwrite(again, b"AGAIN", 0)
    os.close(again)
    os.close(path_fd)
    assert old.read_bytes()[:5] == b"AGAIN"


def test_opened_for_writing_through_a_path_descriptor(old: Path) -> None:
    """What open_by_path and fd_reopen of other programs do: look once, then open what was found."""
    path_fd = os.open(old, os.O_PATH | os.O_NOFOLLOW)
    fd = os.open(f"/proc/self/fd/{path_fd}", os.O_RDWR | os.O_TRUNC)
    os.write(fd, b"short")
    os.close(fd)
    os.close(path_fd)
    assert old.read_bytes() == b"short"


def test_other_names_of_a_file_see_what_was_done_by_one(data_layers: Layers) -> None:
    """Names that the kernel knows since before the copy-up."""
    (data_layers.lower / "one").write_bytes(CONTENT)
    root = data_layers.mount()
    fd = os.open(root / "one", os.O_RDONLY)
    try:
        os.link(root / "one", root / "two")
        for number, name in enumerate(("one", "two", "one")):
            write(root / name, b"n%d" % number)
            assert {(root / other).read_bytes()[:2] for other in ("one", "two")} == {b"n%d" % number}
            os.chmod(root / name, 0o600 + number)
            assert {os.stat(root / other).st_mode & 7 for other in ("one", "two")} == {number}
        os.truncate(root / "two", 5)
        assert [os.stat(root / name).st_size for name in ("one", "two")] == [5, 5]
        assert os.fstat(fd).st_size == 5
        os.unlink(root / "one")
        assert os.stat(root / "two").st_nlink == 1
        assert os.fstat(fd).st_nlink == 1
    finally:
        os.close(fd)


def test_a_writer_of_another_user_is_not_kept_out(old: Path) -> None:
    os.chown(old.parent, 1000, 1000)
    old.chmod(0o666)
    fd = os.open(old, os.O_RDONLY)
    try:
        as_user(1000, lambda: write(old, b"theirs"))
        assert old.read_bytes()[:6] == b"theirs"
    finally:
        os.close(fd)


# Access times


@pytest.mark.parametrize("option", ["relatime", "noatime", "nodiratime", "strictatime", "ro"])
def test_reading_changes_access_times_as_the_mount_says(new_layers: Callable[..., Layers], option: str) -> None:
    """And not as the upper's mount says, nor ever those of a lower layer."""
    layers = new_layers(options=option)
    for layer in (layers.upper, layers.lower):
        (layer / f"{layer.name}-dir").mkdir()
        (layer / f"{layer.name}-file").write_text("text")
        for path in layer.iterdir():
            os.utime(path, (10**9, 10**9))
    root = layers.mount()
    changed = set()
    for path in sorted(root.iterdir()):
        _ = os.listdir(path) if path.is_dir() else path.read_bytes()
        if os.stat(path).st_atime != 10**9:
            changed.add(path.name)
    expected = {
        "relatime": {"upper-dir", "upper-file"}, "noatime": set(), "nodiratime": {"upper-file"},
        "strictatime": {"upper-dir", "upper-file"}, "ro": set(),
    }  # fmt: skip
    assert changed == expected[option]


def test_copy_file_range_leaves_the_access_time_of_what_is_copied(layers: Layers) -> None:
    paths = {"lower": layers.lower / "lower", "upper": layers.upper / "upper"}

    def prepare() -> None:
        for path in paths.values():
            path.write_bytes(CONTENT)
            os.utime(path, (10**9, 10**9))

    def copy(root: Path) -> dict[str, float]:
        for name in paths:
            with (root / name).open("rb") as source, (root / "copy").open("wb") as into:
                assert os.copy_file_range(source.fileno(), into.fileno(), 100) == 100
        return {name: os.stat(path).st_atime for name, path in paths.items()}

    prepare()
    with layers.kernel() as root:
        assert copy(root) == {"lower": 10**9, "upper": 10**9}
    prepare()
    assert copy(layers.mount()) == {"lower": 10**9, "upper": 10**9}


def test_listing_a_directory_changes_its_access_time_though_its_names_are_known(layers: Layers) -> None:
    (layers.lower / "dir").mkdir()
    root = layers.mount()
    (root / "new").mkdir()
    (root / "dir" / "child").touch()
    os.listdir(root / "dir")
    for name in ("new", "dir"):
        os.utime(root / name, (10**9, 10**9))
        os.close(os.open(root / name, os.O_RDONLY))
        assert os.stat(root / name).st_atime == 10**9
        os.listdir(root / name)
        assert os.stat(root / name).st_atime > 10**9


def test_truncate_to_the_size_that_a_file_has_changes_no_time_where_it_changes_none(
    ground: Ground, quiet: None, tmp_path: Path
) -> None:
    """On xfs, that is; ftruncate(2) does everywhere."""
    long_ago = 10**18
    with other_ground(ground, "xfs", tmp_path) as elsewhere:
        layers = Layers(elsewhere)
        for path in (layers.lower / "lower", layers.upper / "upper", layers.lower / "cut"):
            path.write_bytes(CONTENT)
            os.utime(path, ns=(long_ago, long_ago))
        root = layers.mount()
        os.truncate(root / "cut", 5)
        assert os.stat(root / "cut").st_mtime_ns > long_ago, "of which no more was copied up"
        for name in ("lower", "upper"):
            os.utime(root / name, ns=(long_ago, long_ago))
            before = os.stat(root / name)
            os.truncate(root / name, len(CONTENT))
            after = os.stat(root / name)
            assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
            with open(root / name, "r+b") as file:
                os.ftruncate(file.fileno(), len(CONTENT))
            assert os.stat(root / name).st_mtime_ns > long_ago
            os.utime(root / name, ns=(long_ago, long_ago))
            os.truncate(root / name, 5)
            assert (root / name).read_bytes() == CONTENT[:5]
            assert os.stat(root / name).st_mtime_ns > long_ago
        layers.close()


def test_whoever_opens_a_copied_up_file_by_another_of_its_names_gets_the_copy(data_layers: Layers) -> None:
    """Also the thread that was once sent to look the name up again, and a mapping too."""
    (data_layers.lower / "a").write_bytes(b"old\n")
    root = data_layers.mount()
    held = os.open(root / "a", os.O_RDONLY)
    os.read(held, 4)
    os.chmod(root / "a", 0o600)
    os.link(root / "a", root / "b")
    for words in (b"new\n", b"NEW\n"):
        fd = os.open(root / "a", os.O_WRONLY | os.O_TRUNC)
        os.write(fd, words)
        os.close(fd)
    fd = os.open(root / "b", os.O_RDONLY)
    with mmap.mmap(fd, 4, prot=mmap.PROT_READ) as mapping:
        assert (mapping[:], os.read(fd, 4)) == (b"NEW\n", b"NEW\n")
    os.close(fd)
    os.close(held)
