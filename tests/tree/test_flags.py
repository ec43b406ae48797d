"""File attribute flags: what lsattr(1) and chattr(1) do, and what immutable and append-only files refuse.

The same is done on layers that overt mounts and on equal ones that the kernel mounts, on each filesystem that an upper
may be on; then each of them mounts what the other one has left.
"""

import errno
import fcntl
import mmap
import os
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overt.host import mounts, process
from overt.host.files import (
    FALLOC_FL_KEEP_SIZE,
    FS_IOC_FSGETXATTR,
    FS_IOC_FSSETXATTR,
    FS_IOC_GETFLAGS,
    FS_IOC_SETFLAGS,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    UTIME_NOW,
    UTIME_OMIT,
    fallocate,
    renameat2,
    utimensat,
)  # fmt: skip

from .ground import Ground, Layers, as_user, link_open, other_ground

SYNC, IMMUTABLE, APPEND, NODUMP, NOATIME = 0x08, 0x10, 0x20, 0x40, 0x80
OWNER, STRANGER = 1000, 1001
_ACL = b"\x02\0\0\0" + b"".join(
    struct.pack("<HHI", tag, 6, identity)
    for tag, identity in ((1, 0xFFFFFFFF), (2, 1000), (4, 0xFFFFFFFF), (16, 0xFFFFFFFF), (32, 0xFFFFFFFF))
)

Place = Ground


@pytest.fixture(scope="module", params=["ext4", "xfs", "btrfs"])
def place(request: pytest.FixtureRequest, ground: Ground) -> Iterator[Place]:
    """A filesystem of each kind, and the server."""
    with tempfile.TemporaryDirectory(prefix="overt-flags-", dir=ground.directory) as name:
        Path(name).chmod(0o755)
        with other_ground(ground, request.param, Path(name)) as elsewhere:
            yield elsewhere


class Twins:
    """Equal layers, of which overt mounts one set and the kernel the other."""

    def __init__(self, place: Place, prepare: Callable[[Path], object], options: str = "", features: str = "") -> None:
        self.ours, self.theirs = (Layers(place, options=options, features=features) for _ in range(2))
        for layers in (self.ours, self.theirs):
            prepare(layers.lower)

    def compare(self, do: Callable[[Path], Any]) -> Any:
        """What `do` says of both mounts, which has to be the same."""
        mine = do(self.ours.mount())
        self.ours.umount()
        with self.theirs.kernel() as root:
            its = do(root)
        assert mine == its
        return its

    def compare_exchanged(self, do: Callable[[Path], Any]) -> Any:
        """The same, each mounting what the other one has left."""
        with self.ours.kernel() as root:
            its = do(root)
        mine = do(self.theirs.mount())
        self.theirs.umount()
        assert mine == its
        return its

    def close(self) -> None:
        for layers in (self.ours, self.theirs):
            if os.path.ismount(layers.path):
                mounts.umount(layers.path, mounts.MNT_DETACH)
            subprocess.run(["chattr", "-R", "-f", "-ia", layers.place], check=False, timeout=60)
            layers.close()


@pytest.fixture
def twins(place: Place, quiet: None) -> Iterator[Callable[..., Twins]]:
    made: list[Twins] = []

    def make(prepare: Callable[[Path], object], options: str = "", features: str = "") -> Twins:
        made.append(Twins(place, prepare, options, features))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


# Asking


def attempt(call: Callable[[], Any]) -> Any:
    """What it returns, or the name of its errno."""
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def on(path: Path, call: Callable[[int], Any], how: int = os.O_RDONLY) -> Any:
    """What `call` returns for the file opened."""
    fd = os.open(path, how | os.O_NONBLOCK)
    try:
        return call(fd)
    finally:
        os.close(fd)


def get(fd: int) -> int:
    word = bytearray(4)
    fcntl.ioctl(fd, FS_IOC_GETFLAGS, word)
    return int(struct.unpack("=I", word)[0])


def put(fd: int, flags: int) -> None:
    fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("=I", flags))


def xget(fd: int) -> tuple[int, ...]:
    room = bytearray(28)
    fcntl.ioctl(fd, FS_IOC_FSGETXATTR, room)
    return struct.unpack("=IIIII8x", room)


def xput(fd: int, *words: int) -> None:
    fcntl.ioctl(fd, FS_IOC_FSSETXATTR, struct.pack("=IIIII8x", *words))


def flags_of(path: Path) -> int:
    return int(on(path, get))


def add(path: Path, flags: int) -> None:
    on(path, lambda fd: put(fd, get(fd) | flags))


def take(path: Path, flags: int) -> None:
    on(path, lambda fd: put(fd, get(fd) & ~flags))


def state(path: Path) -> Any:
    """What a change may have changed."""
    st = os.lstat(path)
    if not stat.S_ISREG(st.st_mode) and not stat.S_ISDIR(st.st_mode):
        return oct(st.st_mode), st.st_uid
    keys = sorted(os.listxattr(path))
    inside: Any = sorted(os.listdir(path)) if stat.S_ISDIR(st.st_mode) else (path.read_bytes(), st.st_nlink)
    return oct(st.st_mode), st.st_uid, int(st.st_mtime) == 10**9, keys, inside, flags_of(path)


# Files


def appended(path: Path) -> Any:
    return on(path, lambda fd: os.write(fd, b"more"), os.O_WRONLY | os.O_APPEND)


FILE: dict[str, Callable[[Path], Any]] = {
    "read": lambda path: path.read_bytes(),
    "open to write": lambda path: on(path, lambda fd: None, os.O_WRONLY),
    "open for both": lambda path: on(path, lambda fd: None, os.O_RDWR),
    "open to cut": lambda path: on(path, lambda fd: None, os.O_RDONLY | os.O_TRUNC),
    "open to cut and append": lambda path: on(path, lambda fd: None, os.O_WRONLY | os.O_TRUNC | os.O_APPEND),
    "create": lambda path: on(path, lambda fd: None, os.O_WRONLY | os.O_CREAT),
    "append": appended,
    "append to both": lambda path: on(path, lambda fd: os.write(fd, b"more"), os.O_RDWR | os.O_APPEND),
    "cut what is to grow": lambda path: on(path, lambda fd: os.ftruncate(fd, 1), os.O_WRONLY | os.O_APPEND),
    "make room": lambda path: on(
        path, lambda fd: fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 9000), os.O_WRONLY | os.O_APPEND
    ),
    "make it longer": lambda path: on(path, lambda fd: fallocate(fd, 0, 0, 9000), os.O_WRONLY | os.O_APPEND),
    "punch": lambda path: on(path, lambda fd: fallocate(fd, 3, 0, 2), os.O_WRONLY | os.O_APPEND),
    "truncate": lambda path: os.truncate(path, 1),
    "grow": lambda path: os.truncate(path, 9),
    "unlink": os.unlink,
    "rename": lambda path: os.rename(path, path.with_name("renamed")),
    "replace": lambda path: os.rename(path.with_name("other"), path),
    "do not replace": lambda path: flagged_rename(path.with_name("other"), path, RENAME_NOREPLACE),
    "exchange": lambda path: flagged_rename(path.with_name("other"), path, RENAME_EXCHANGE),
    "link": lambda path: os.link(path, path.with_name("linked")),
    "chmod": lambda path: os.chmod(path, 0o600),
    "fchmod": lambda path: on(path, lambda fd: os.fchmod(fd, 0o600)),
    "chown": lambda path: os.chown(path, 5, 5),
    "chown nobody": lambda path: os.chown(path, -1, -1),
    "set times": lambda path: os.utime(path, (10**9 + 5, 10**9 + 5)),
    "touch": lambda path: os.utime(path),
    "touch one": lambda path: utimensat(-100, os.fsencode(path), (0, UTIME_NOW), (0, UTIME_OMIT)),
    "setxattr": lambda path: os.setxattr(path, "user.more", b"1"),
    "trusted setxattr": lambda path: os.setxattr(path, "trusted.more", b"1"),
    "removexattr": lambda path: os.removexattr(path, "user.some"),
    "removexattr of none": lambda path: os.removexattr(path, "user.none"),
    "set an ACL": lambda path: os.setxattr(path, "system.posix_acl_access", _ACL),
    "clear the flags": lambda path: take(path, IMMUTABLE | APPEND),
    "clear and unlink": lambda path: (take(path, IMMUTABLE | APPEND), os.unlink(path)),
    "one more flag": lambda path: add(path, NODUMP),
    "both": lambda path: add(path, IMMUTABLE | APPEND),
    "clear by fssetxattr": lambda path: on(path, lambda fd: xput(fd, 0, *xget(fd)[1:])),
    "read flags": lambda path: on(path, lambda fd: (get(fd), xget(fd)[0])),
}


def flagged_rename(old: Path, new: Path, flags: int) -> None:
    renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags)


def furnish_files(lower: Path) -> None:
    for number in range(len(FILE)):
        directory = lower / str(number)
        directory.mkdir()
        for name in ("it", "other"):
            (directory / name).write_text("text")
            os.setxattr(directory / name, "user.some", b"1")
            os.chmod(directory / name, 0o666)
            os.utime(directory / name, (10**9, 10**9))
        os.chmod(directory, 0o777)


def do_all(root: Path, flags: int, uid: int, *, here: bool) -> dict[str, Any]:
    """`here`: the flags are set through the mount."""
    found: dict[str, Any] = {}
    for number, (name, call) in enumerate(FILE.items()):
        path = root / str(number) / "it"
        if here:
            add(path, flags)

        def do(path: Path = path, call: Callable[[Path], Any] = call) -> Any:
            return attempt(lambda: call(path))

        found[name] = as_user(uid, do) if uid else do()
        found[f"after {name}"] = {child.name: state(child) for child in sorted(path.parent.iterdir())}
    return found


FLAGS = {"immutable": IMMUTABLE, "append": APPEND, "both": IMMUTABLE | APPEND, "others": NODUMP | NOATIME | SYNC}


@pytest.mark.parametrize(
    ("uid", "options"),
    [(0, ""), pytest.param(0, "nopassthrough", marks=pytest.mark.long), (STRANGER, "")],
    ids=["root", "no passthrough", "stranger"],
)
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("where", ["lower", "upper"])
def test_a_file_with_flags_refuses_what_it_refuses_in_the_kernel(
    twins: Callable[..., Twins], where: str, flags: str, uid: int, options: str
) -> None:
    def prepare(lower: Path) -> None:
        furnish_files(lower)
        if where == "lower":
            for number in range(len(FILE)):
                add(lower / str(number) / "it", FLAGS[flags])

    pair = twins(prepare, options)
    found = pair.compare(lambda root: do_all(root, FLAGS[flags], uid, here=where == "upper"))
    assert found["read"] == b"text"
    assert (found["open to write"] == "EPERM") == (flags != "others")
    pair.compare_exchanged(everything)


def everything(root: Path) -> dict[str, Any]:
    """The state of each file, and what a change of it says."""
    found: dict[str, Any] = {}
    for directory, _, names in os.walk(root):
        for path in sorted((Path(directory), *(Path(directory, name) for name in names))):
            found[str(path.relative_to(root))] = state(path), attempt(lambda path=path: os.chmod(path, 0o777))
    return found


# Directories


def modified(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"T")


def tmpfile(path: Path, *, link: bool = False) -> None:
    fd = os.open(path, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        if link:
            link_open(fd, path / "from nowhere")
    finally:
        os.close(fd)


DIRECTORY: dict[str, Callable[[Path], Any]] = {
    "list": os.listdir,
    "create": lambda path: on(path / "new", lambda fd: None, os.O_WRONLY | os.O_CREAT),
    "create what is there": lambda path: on(path / "file", lambda fd: None, os.O_WRONLY | os.O_CREAT),
    "mkdir": lambda path: os.mkdir(path / "new"),
    "mkdir what is there": lambda path: os.mkdir(path / "file"),
    "mkfifo": lambda path: os.mkfifo(path / "new"),
    "symlink": lambda path: os.symlink("x", path / "new"),
    "link in": lambda path: os.link(path.parent / "beside", path / "new"),
    "link within": lambda path: os.link(path / "file", path / "new"),
    "tmpfile": tmpfile,
    "tmpfile and link": lambda path: tmpfile(path, link=True),
    "unlink": lambda path: os.unlink(path / "file"),
    "unlink nothing": lambda path: os.unlink(path / "none"),
    "rmdir": lambda path: os.rmdir(path / "empty"),
    "rmdir full": lambda path: os.rmdir(path / "full"),
    "rename within": lambda path: os.rename(path / "file", path / "new"),
    "rename out": lambda path: os.rename(path / "file", path.parent / "new"),
    "rename in": lambda path: os.rename(path.parent / "beside", path / "new"),
    "rename over": lambda path: os.rename(path.parent / "beside", path / "file"),
    "exchange": lambda path: flagged_rename(path.parent / "beside", path / "file", RENAME_EXCHANGE),
    "change a file": lambda path: modified(path / "file"),
    "chmod a file": lambda path: os.chmod(path / "file", 0o600),
    "create deeper": lambda path: (path / "empty" / "new").touch(),
    "unlink deeper": lambda path: os.unlink(path / "full" / "file"),
    "chmod": lambda path: os.chmod(path, 0o700),
    "chown": lambda path: os.chown(path, 5, 5),
    "touch": lambda path: os.utime(path),
    "set times": lambda path: os.utime(path, (1, 1)),
    "setxattr": lambda path: os.setxattr(path, "user.more", b"1"),
    "default ACL": lambda path: os.setxattr(path, "system.posix_acl_default", _ACL),
    "rename itself": lambda path: os.rename(path, path.with_name("elsewhere")),
    "rmdir itself": os.rmdir,
    "clear the flags": lambda path: take(path, IMMUTABLE | APPEND),
    "clear and remove": lambda path: (take(path, IMMUTABLE | APPEND), os.unlink(path / "file")),
    "read flags": lambda path: on(path, lambda fd: (get(fd), xget(fd)[0])),
}


def furnish_directories(lower: Path) -> None:
    for number in range(len(DIRECTORY)):
        directory = lower / str(number) / "it"
        (directory / "full").mkdir(parents=True)
        (directory / "empty").mkdir()
        for path in (directory / "file", directory / "full" / "file", directory.parent / "beside"):
            path.write_text("text")
            os.chmod(path, 0o666)
        for path in (directory, directory / "full", directory / "empty", directory.parent):
            os.chmod(path, 0o777)
            os.utime(path, (10**9, 10**9))


@pytest.mark.parametrize("uid", [0, pytest.param(STRANGER, marks=pytest.mark.long)], ids=["root", "stranger"])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("where", ["lower", "upper"])
def test_a_directory_with_flags_refuses_what_it_refuses_in_the_kernel(
    twins: Callable[..., Twins], where: str, flags: str, uid: int
) -> None:
    def prepare(lower: Path) -> None:
        furnish_directories(lower)
        if where == "lower":
            for number in range(len(DIRECTORY)):
                add(lower / str(number) / "it", FLAGS[flags])

    def do(root: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for number, (name, call) in enumerate(DIRECTORY.items()):
            path = root / str(number) / "it"
            if where == "upper":
                add(path, FLAGS[flags])

            def once(path: Path = path, call: Callable[[Path], Any] = call) -> Any:
                return attempt(lambda: call(path))

            found[name] = as_user(uid, once) if uid else once()
            found[f"after {name}"] = {
                str(child.relative_to(root)): state(child) for child in sorted(path.parent.rglob("*"))
            }
        return found

    pair = twins(prepare)
    found = pair.compare(do)
    if flags != "others":
        assert found["unlink"] == "EPERM"
        assert found["create"] == (None if flags == "append" else "EPERM")
    pair.compare_exchanged(everything)


def test_the_root_of_an_overlay_can_be_immutable(twins: Callable[..., Twins]) -> None:
    def do(root: Path) -> Any:
        add(root, IMMUTABLE)
        refused = attempt(lambda: (root / "new").touch()), attempt(lambda: os.unlink(root / "file"))
        seen = flags_of(root)
        modified(root / "file")
        take(root, IMMUTABLE)
        (root / "new").touch()
        add(root, IMMUTABLE)
        return refused, seen

    pair = twins(lambda lower: (lower / "file").write_text("text"))
    assert pair.compare(do)[0] == ("EPERM", "EPERM")
    with pair.ours.kernel() as root:  # which does not look at the mark of the root when it mounts (ovl_get_root)
        assert flags_of(root) & IMMUTABLE == 0
    path = pair.theirs.mount()
    assert attempt(lambda: os.unlink(path / "file")) == "EPERM"
    take(path, IMMUTABLE)


# What was open before


OPEN: dict[str, Callable[[int], Any]] = {
    "write": lambda fd: os.pwrite(fd, b"T", 0),
    "cut": lambda fd: os.ftruncate(fd, 2),
    "grow": lambda fd: os.ftruncate(fd, 20),
    "make room": lambda fd: fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 9000),
    "make it longer": lambda fd: fallocate(fd, 0, 0, 9000),
    "punch": lambda fd: fallocate(fd, 3, 0, 2),
    "copy into it": lambda fd: os.copy_file_range(fd, fd, 2, 0, 10000),
    "fchmod": lambda fd: os.fchmod(fd, 0o600),
    "fchown nobody": lambda fd: os.fchown(fd, -1, -1),
    "touch": lambda fd: os.utime(fd),
    "open again": lambda fd: on(Path(f"/proc/self/fd/{fd}"), lambda again: None, os.O_RDWR),
    "give a name": lambda fd: link_open(fd, Path(os.readlink(f"/proc/self/fd/{fd}")).with_name("linked")),
    "flags": get,
}


@pytest.mark.parametrize("options", ["", "nopassthrough"], ids=["passthrough", "nopassthrough"])
@pytest.mark.parametrize("flags", ["immutable", "append", "both"])
def test_what_was_open_for_writing_before_may_do_what_it_may_in_the_kernel(
    twins: Callable[..., Twins], flags: str, options: str
) -> None:
    def prepare(lower: Path) -> None:
        for number in range(len(OPEN)):
            (lower / str(number)).mkdir()
            (lower / str(number) / "it").write_text("text")

    def do(root: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for number, (name, call) in enumerate(OPEN.items()):
            path = root / str(number) / "it"

            def change(fd: int, path: Path = path, call: Callable[[int], Any] = call) -> Any:
                add(path, FLAGS[flags])
                return attempt(lambda: call(fd))

            found[name] = on(path, change, os.O_RDWR)
            found[f"after {name}"] = state(path)
        return found

    assert twins(prepare, options).compare(do)["write"] == 1


@pytest.mark.parametrize("by", ["name", "descriptor"])
def test_an_open_lower_file_gets_flags(data_layers: Layers, by: str) -> None:
    """The request comes under the number that the file had before it was copied up (docs/decisions/0003)."""
    (data_layers.lower / "file").write_text("text")
    path = data_layers.mount() / "file"

    def change(fd: int) -> None:
        for flags in (NODUMP, NODUMP | NOATIME, 0, APPEND):
            if by == "name":
                subprocess.run(["chattr", f"={'d' * bool(flags & NODUMP)}{'A' * bool(flags & NOATIME)}"
                                f"{'a' * bool(flags & APPEND)}", path], check=True, timeout=10)  # fmt: skip
            else:
                put(fd, flags)
            both = NODUMP | NOATIME | APPEND
            assert (get(fd) & both, flags_of(path) & both) == (flags, flags)
        assert os.read(fd, 10) == b"text"

    on(path, change)
    assert attempt(lambda: modified(path)) == "EPERM"
    on(path, lambda fd: put(fd, 0))


# An append-only file only grows


@pytest.mark.parametrize("options", ["", "nopassthrough"], ids=["passthrough", "nopassthrough"])
def test_an_append_only_file_is_never_overwritten(new_layers: Callable[..., Layers], options: str) -> None:
    layers = new_layers(options=options)
    (layers.lower / "file").write_text("text")
    path = layers.mount() / "file"
    add(path, APPEND)

    def write(fd: int) -> None:
        assert os.write(fd, b"1") == 1
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)  # the kernel refuses this of its own overlay: EPERM
        assert attempt(lambda: os.pwrite(fd, b"X", 0)) == "EPERM"
        assert attempt(lambda: fallocate(fd, 3, 0, 2)) == "EPERM"
        assert attempt(lambda: os.ftruncate(fd, 0)) == "EPERM"
        assert attempt(lambda: os.copy_file_range(fd, fd, 1, 1, 0)) == "EPERM"
        assert os.pwrite(fd, b"2", 5) == 1

    try:
        on(path, write, os.O_RDWR | os.O_APPEND)
        appended(path)
        both = [os.open(path, os.O_WRONLY | os.O_APPEND) for _ in range(2)]
        for number in range(6):
            os.write(both[number % 2], b"%d" % number)
        for fd in both:
            os.close(fd)
        assert path.read_bytes() == (layers.upper / "file").read_bytes() == b"text12more012345"
    finally:
        take(path, APPEND)
    modified(path)
    assert path.read_bytes() == b"Text12more012345"


def test_nor_by_one_who_writes_beside_readers(data_layers: Layers) -> None:
    (data_layers.lower / "file").write_text("text")
    path = data_layers.mount() / "file"
    below = os.open(path, os.O_RDONLY)
    add(path, APPEND)
    above = os.open(path, os.O_RDONLY)

    def write(fd: int) -> None:
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        assert attempt(lambda: os.pwrite(fd, b"X", 0)) == "EPERM"
        assert os.pwrite(fd, b"2", 4) == 1

    try:
        on(path, write, os.O_WRONLY | os.O_APPEND)
        assert appended(path) == 4
        assert os.pread(above, 99, 0) == path.read_bytes() == b"text2more"
        assert os.fstat(below).st_size == os.fstat(above).st_size == 9
    finally:
        take(path, APPEND)
        os.close(below)
        os.close(above)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("options", ["", "nopassthrough", "volatile"])
def test_whoever_has_it_open_to_append_can_and_all_see_what_the_others_wrote(
    twins: Callable[..., Twins], options: str
) -> None:
    """One of them opens it for both while others have it open: the file has two numbers then, which kernels do not know
    of each other's size.
    """

    def do(root: Path) -> Any:
        path = root / "file"
        fds = [os.open(path, os.O_WRONLY | os.O_APPEND)]  # before it is append-only, so by passthrough
        add(path, APPEND)
        found: list[Any] = []
        try:
            fds += [os.open(path, how) for how in (os.O_WRONLY | os.O_APPEND, os.O_RDONLY, os.O_RDWR | os.O_APPEND)]
            for turn, writer in enumerate((1, 3, 1, 1, 3, 3, 0, 3, 0, 1, 3, 0, 0, 1, 3, 1)):
                data = b"%x" % turn * (3 << 20 if turn in (3, 4) else 3)
                found.append((
                    attempt(lambda fd=fds[writer], data=data: os.write(fd, data)),
                    path.stat().st_size, [os.fstat(fd).st_size for fd in fds],
                ))  # fmt: skip
            whole = path.read_bytes()
            found.append((whole[:20], whole[-40:], [os.pread(fds[n], len(whole) + 9, 0) == whole for n in (2, 3)]))
            os.close(fds.pop(0))
            found.append((os.write(fds[0], b"x"), path.stat().st_size))
        finally:
            take(path, APPEND)
            for fd in fds:
                os.close(fd)
        return found, path.stat().st_size, path.read_bytes()[-9:]

    found = twins(lambda lower: (lower / "file").write_text("text"), options=options).compare(do)[0]
    assert all(isinstance(said, int) for said, *_ in found[:-2])


def test_without_o_append_nothing_is_overwritten_under_either_number(layers: Layers) -> None:
    (layers.lower / "file").write_text("text")
    path = layers.mount() / "file"
    add(path, APPEND)
    reader = os.open(path, os.O_RDONLY)
    one, other = (os.open(path, how | os.O_APPEND) for how in (os.O_WRONLY, os.O_RDWR))
    try:
        assert os.fstat(one).st_ino == os.fstat(other).st_ino
        os.write(one, b"1")
        for fd in (one, other):
            fcntl.fcntl(fd, fcntl.F_SETFL, 0)
            assert attempt(lambda fd=fd: os.pwrite(fd, b"X", 4)) == "EPERM"
        assert os.pread(reader, 9, 0) == b"text1"
    finally:
        take(path, APPEND)
        for fd in (reader, one, other):
            os.close(fd)
    modified(path)


@pytest.mark.parametrize("readers", [False, True], ids=["alone", "beside a reader"])
@pytest.mark.parametrize("options", ["", "nopassthrough", "volatile"])
def test_nor_by_a_mapping(new_layers: Callable[..., Layers], options: str, readers: bool) -> None:
    layers = new_layers(options=options)
    (layers.lower / "file").write_text("text" * 1024)
    path = layers.mount() / "file"
    add(path, APPEND)
    reader = os.open(path, os.O_RDONLY) if readers else -1
    try:
        on(path, may_only_append, os.O_RDWR | os.O_APPEND)
        assert (layers.upper / "file").read_bytes() == path.read_bytes() == b"text" * 1024 + b"more"
        if readers:
            assert os.pread(reader, 9000, 4092) == b"textmore"
            assert os.fstat(reader).st_size == 4100
    finally:
        take(path, APPEND)
        if readers:
            os.close(reader)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 4096) as mapped:
        mapped[0:4] = b"gone"
        mapped.flush()
    assert path.read_bytes()[:8] == b"gonetext"


def may_only_append(fd: int) -> None:
    assert attempt(lambda: overwrite_mapped(fd)) == "ENODEV"  # EACCES in the kernel
    with mmap.mmap(fd, 4096, mmap.MAP_PRIVATE) as mapped:
        mapped[0:4] = b"mine"
        assert mapped[0:8] == b"minetext"
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.write(fd, b"more")
    assert os.pread(reading, 9000, 4092) == os.pread(fd, 9000, 4092) == b"textmore"
    assert os.fstat(reading).st_size == 4100
    os.close(reading)


@pytest.mark.parametrize("options", ["", "nopassthrough", "volatile"])
def test_a_mapping_of_a_file_that_is_written_through_the_server(
    new_layers: Callable[..., Layers], options: str
) -> None:
    """In a volatile mount O_SYNC writes go that way (server/data.py)."""
    path = new_layers(options=options).mount() / "file"
    path.write_bytes(b"text" * 1024)
    on(path, overwrite_mapped, os.O_RDWR | os.O_SYNC)
    assert path.read_bytes()[:8] == b"gonetext"


def overwrite_mapped(fd: int) -> None:
    with mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        mapped[0:4] = b"gone"
        mapped.flush()


# Who may set them, and on what


ASKED = {
    "immutable": IMMUTABLE, "append": APPEND, "nodump": NODUMP, "nothing": 0, "all": IMMUTABLE | APPEND | NODUMP,
    "unknown": 0x80000000, "extents": 0x80000, "no copy on write": 0x800000,
}  # fmt: skip
WHO = ("root", "root without the capability", "owner", "stranger")


def by(who: str, call: Callable[[], Any]) -> Any:
    def without() -> Any:
        process.keep_capabilities(set(process.CAPABILITIES) - {"linux_immutable"})
        return attempt(call)

    if who == "root":
        return attempt(call)
    if who == "root without the capability":
        return as_user(0, without)
    return as_user(OWNER if who == "owner" else STRANGER, lambda: attempt(call))


@pytest.mark.parametrize("kind", ["file", pytest.param("directory", marks=pytest.mark.long)])
@pytest.mark.parametrize("before", [0, NODUMP, IMMUTABLE, APPEND], ids=["plain", "nodump", "immutable", "append"])
def test_who_may_set_which(twins: Callable[..., Twins], kind: str, before: int) -> None:
    cases = [(who, asked, way) for who in WHO for asked in ASKED for way in ("set", "add", "extended")]

    def prepare(lower: Path) -> None:
        for number in range(len(cases)):
            path = lower / str(number)
            path.mkdir() if kind == "directory" else path.write_text("text")
            os.chown(path, OWNER, OWNER)
            os.chmod(path, 0o755)
            add(path, before)

    def ask(fd: int, asked: int, way: str) -> None:
        if way == "set":
            put(fd, asked)
        elif way == "add":
            put(fd, get(fd) | asked)
        else:
            xput(fd, {IMMUTABLE: 0x8, APPEND: 0x10, NODUMP: 0x80}.get(asked, asked), 0, 0, asked == NODUMP, 0)

    def do(root: Path) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for number, (who, asked, way) in enumerate(cases):
            path = root / str(number)
            said = by(who, lambda path=path, asked=asked, way=way: on(path, lambda fd: ask(fd, ASKED[asked], way)))
            found[who, asked, way] = said, on(path, get), on(path, xget), os.stat(path).st_uid
        return found

    pair = twins(prepare)
    found = pair.compare(do)
    assert found["owner", "immutable", "add"][0] == (None if before == IMMUTABLE else "EPERM")
    assert found["stranger", "nodump", "add"][0] == "EPERM"
    pair.compare_exchanged(lambda root: [(on(root / str(n), get), on(root / str(n), xget)) for n in range(len(cases))])


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("by_hand", [IMMUTABLE, APPEND], ids=["immutable", "append"])
def test_a_file_of_the_upper_that_has_the_flag_itself(twins: Callable[..., Twins], kind: str, by_hand: int) -> None:
    pair = twins(lambda lower: None)
    for layers in (pair.ours, pair.theirs):
        path = layers.upper / "it"
        path.mkdir() if kind == "directory" else path.write_text("text")
        add(path, by_hand)

    def do(root: Path) -> Any:
        path = root / "it"
        return [
            flags_of(path), attempt(lambda: os.chmod(path, 0o700)), attempt(lambda: path.rename(root / "new")),
            attempt(lambda: take(path, by_hand)), flags_of(path), attempt(lambda: add(path, IMMUTABLE | APPEND)),
            flags_of(path),
        ]  # fmt: skip

    assert pair.compare(do)[0] & by_hand


MADE: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "null": lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
    "symlink": lambda path: os.symlink("none", path),
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
}


@pytest.mark.parametrize("kind", MADE)
def test_other_kinds_of_files_have_no_flags(twins: Callable[..., Twins], kind: str) -> None:
    def do(root: Path) -> Any:
        how = os.O_PATH | os.O_NOFOLLOW if kind in ("symlink", "socket") else os.O_RDWR
        path = root / "it"
        return [attempt(lambda: on(path, get, how)), attempt(lambda: on(path, lambda fd: put(fd, NODUMP), how))]

    assert twins(lambda lower: MADE[kind](lower / "it")).compare(do)[0] in ("ENOTTY", "EBADF", "ENXIO")


# Copy-up


@pytest.mark.parametrize("features", ["", "metacopy=on", "index=on"])
def test_what_a_copy_gets(twins: Callable[..., Twins], features: str) -> None:
    """Sync and noatime on the copy itself, append-only and immutable in its mark, nothing else."""
    cases = (0, SYNC, NOATIME, NODUMP, SYNC | NOATIME | NODUMP)

    def prepare(lower: Path) -> None:
        for flags in cases:
            (lower / f"{flags}").write_text("text")
            (lower / f"d{flags}").mkdir()
            add(lower / f"{flags}", flags)
        for flags in (0, IMMUTABLE, APPEND, IMMUTABLE | APPEND | SYNC, APPEND | NOATIME | NODUMP):
            (lower / f"d{flags}").mkdir(exist_ok=True)
            (lower / f"d{flags}" / "file").write_text("text")
            add(lower / f"d{flags}", flags)

    def do(root: Path) -> Any:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                os.chmod(path, 0o640)
        return {str(path): flags_of(root / path) for path in sorted(path.relative_to(root) for path in root.rglob("*"))}

    pair = twins(prepare, features=features)
    pair.compare(do)
    mine, its = ({
        str(path.relative_to(layers.upper)): (
            flags_of(path), attempt(lambda path=path: os.getxattr(path, "trusted.overlay.protattr")),
        )
        for path in sorted(layers.upper.rglob("*"))
    } for layers in (pair.ours, pair.theirs))  # fmt: skip
    assert mine == its
    assert its[f"d{IMMUTABLE | APPEND | SYNC}"][1] == b"ai"
    if features != "index=on":  # which neither takes over from the other on a filesystem that does not tell its UUID
        pair.compare_exchanged(do)


def test_a_mark_of_a_lower_layer_says_nothing_and_is_not_copied(twins: Callable[..., Twins]) -> None:
    def prepare(lower: Path) -> None:
        (lower / "file").write_text("text")
        os.setxattr(lower / "file", "trusted.overlay.protattr", b"i")

    def do(root: Path) -> Any:
        os.chmod(root / "file", 0o600)
        return flags_of(root / "file") & IMMUTABLE, attempt(lambda: os.unlink(root / "file"))

    assert twins(prepare).compare(do) == (0, None)


@pytest.mark.parametrize("value", [b"", b"x", b"ix", b"ia", b"a" * 40])
def test_a_mark_that_the_kernel_does_not_heed(twins: Callable[..., Twins], value: bytes) -> None:
    pair = twins(lambda lower: None)
    for layers in (pair.ours, pair.theirs):
        (layers.upper / "file").write_text("text")
        os.setxattr(layers.upper / "file", "trusted.overlay.protattr", value)
    refused = "EPERM" if value == b"ia" else None
    assert pair.compare(lambda root: (state(root / "file"), attempt(lambda: os.unlink(root / "file"))))[1] == refused


# By name


def test_lsattr_and_chattr(layers: Layers) -> None:
    (layers.lower / "file").write_text("text")
    (layers.lower / "dir").mkdir()
    root = layers.mount()
    for name in ("file", "dir"):

        def call(*words: str, name: str = name) -> str:
            done = subprocess.run([*words, root / name], check=True, timeout=10, capture_output=True, text=True)
            return done.stdout.partition(" ")[0]

        before = call("lsattr", "-d")
        call("chattr", "+id")
        assert set(call("lsattr", "-d")) == {*before, "i", "d"}
        with pytest.raises(subprocess.CalledProcessError):
            subprocess.run(["rm", "-r", root / name], check=True, timeout=10, stderr=subprocess.DEVNULL)
        call("chattr", "-id")
        assert call("lsattr", "-d") == before
    shutil.rmtree(root / "dir")
    os.unlink(root / "file")


def test_the_time_of_change_is_seen(layers: Layers) -> None:
    (layers.upper / "file").write_text("text")
    path = layers.mount() / "file"
    for flags in (NODUMP, IMMUTABLE, 0):
        before = os.stat(path).st_ctime_ns
        on(path, lambda fd, flags=flags: put(fd, flags))
        assert before < os.stat(path).st_ctime_ns == os.stat(layers.upper / "file").st_ctime_ns


def test_a_read_only_overlay_shows_flags_and_takes_none(layers: Layers) -> None:
    (layers.lower / "file").write_text("text")
    add(layers.lower / "file", IMMUTABLE | NODUMP)
    layers.options = "ro"
    path = layers.mount() / "file"
    try:
        assert flags_of(path) & (IMMUTABLE | NODUMP) == IMMUTABLE | NODUMP
        assert attempt(lambda: take(path, IMMUTABLE)) == "EROFS"
    finally:
        take(layers.lower / "file", IMMUTABLE)


def test_views_have_them_too(new_layers: Callable[..., Layers]) -> None:
    layers = new_layers(options="squash_to_uid=1000,static_nlink,noxattrs=1")
    (layers.lower / "file").write_text("text")
    path = layers.mount() / "file"
    assert attempt(lambda: as_user(1000, lambda: add(path, NODUMP))) is None
    assert attempt(lambda: as_user(1001, lambda: add(path, NODUMP))) == "EPERM"
    add(path, IMMUTABLE)
    assert attempt(lambda: os.unlink(path)) == "EPERM"
    assert os.getxattr(layers.upper / "file", "trusted.overlay.protattr") == b"i"
    assert flags_of(layers.upper / "file") & (NODUMP | IMMUTABLE) == NODUMP
    take(path, IMMUTABLE)
    os.unlink(path)


@pytest.mark.parametrize("kind", [1, 2])
def test_owners_in_xattrs_change_nothing_of_it(new_layers: Callable[..., Layers], kind: int) -> None:
    layers = new_layers(options=f"xattr_permissions={kind}")
    (layers.lower / "file").write_text("text")
    path = layers.mount() / "file"
    os.chown(path, OWNER, OWNER)
    as_user(OWNER, lambda: add(path, NODUMP))
    assert as_user(OWNER, lambda: attempt(lambda: add(path, IMMUTABLE))) == "EPERM"
    add(path, IMMUTABLE)
    for call in (lambda: os.chmod(path, 0o600), lambda: os.chown(path, 1, 1), lambda: os.unlink(path)):
        assert attempt(call) == "EPERM"
    assert flags_of(path) & (IMMUTABLE | NODUMP) == IMMUTABLE | NODUMP
    take(path, IMMUTABLE)
    os.unlink(path)


NOT_SERVED = {"FS_IOC_GETVERSION": 0x80087601, "FS_IOC_SETVERSION": 0x40087602, "TCGETS": 0x5401,
              "FS_IOC_GETFSLABEL": 0x81009431, "the flags of 32 bits": 0x80046601}  # fmt: skip


@pytest.mark.parametrize("command", NOT_SERVED.values(), ids=NOT_SERVED)
def test_other_commands_are_answered_as_before(twins: Callable[..., Twins], command: int) -> None:
    def do(root: Path) -> Any:
        return attempt(lambda: on(root / "file", lambda fd: bool(fcntl.ioctl(fd, command, bytes(256)))))

    assert twins(lambda lower: (lower / "file").write_text("text")).compare(do) in ("ENOTTY", "EINVAL")
