"""The same operations on two trees, and everything that can be seen of what they did.

An operation is a tuple: its name, whether it is done as an ordinary user, and its arguments. Its result is what the
system call returned, or its errno.
"""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from overt.host.files import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate, renameat2

from .ground import link_open, opaque, whiteout

USER = 1000
LONG_AGO = 10**9
"""seconds; what layers are made with, so that a time that changed can be told from one that did not"""

Operation = tuple[Any, ...]


class Twin:
    """One of the trees, and the files that are open in it."""

    def __init__(self, root: Path, lowers: list[Path], *, touches: bool = False) -> None:
        """`touches`: who opens a file for writing changes its time, as the kernel does when that brings the data."""
        self.root = root
        self.touches = touches
        self.numbers = numbers_of(lowers)
        self.open: dict[int, int] = {}

    def perform(self, operation: Operation) -> Any:
        """Do it; return the result or the name of the errno."""
        verb, user, *arguments = operation
        call: Callable[..., Any] = getattr(self, f"do_{verb}")
        if user:
            os.setegid(USER)
            os.seteuid(USER)
        try:
            return call(*arguments)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        finally:
            if user:
                os.seteuid(0)
                os.setegid(0)

    def close(self) -> None:
        for fd in self.open.values():
            os.close(fd)
        self.open.clear()

    def _at(self, name: str) -> Path:
        return self.root / name

    # Names

    def do_mkdir(self, name: str, mode: int) -> None:
        os.mkdir(self._at(name), mode)

    def do_rmdir(self, name: str) -> None:
        os.rmdir(self._at(name))

    def do_unlink(self, name: str) -> None:
        os.unlink(self._at(name))

    def do_symlink(self, name: str, target: str) -> None:
        os.symlink(target, self._at(name))

    def do_mknod(self, name: str, mode: int, device: int) -> None:
        os.mknod(self._at(name), mode, device)

    def do_link(self, name: str, new: str) -> None:
        os.link(self._at(name), self._at(new), follow_symlinks=False)

    def do_rename(self, name: str, new: str, flags: int) -> None:
        try:
            renameat2(-100, os.fsencode(self._at(name)), -100, os.fsencode(self._at(new)), flags)
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:  # the kernel has changed directories' times when it finds this out
                for path in (self._at(name), self._at(new)):
                    os.utime(path.parent)
            raise

    # Attributes

    def do_chmod(self, name: str, mode: int) -> None:
        os.chmod(self._at(name), mode)

    def do_chown(self, name: str, uid: int, gid: int) -> None:
        os.lchown(self._at(name), uid, gid)

    def do_utime(self, name: str, when: int) -> None:
        os.utime(self._at(name), (when, when + 1), follow_symlinks=False)

    def do_setxattr(self, name: str, key: str, value: bytes, flags: int) -> None:
        os.setxattr(self._at(name), key, value, flags, follow_symlinks=False)

    def do_getxattr(self, name: str, key: str) -> bytes:
        return os.getxattr(self._at(name), key, follow_symlinks=False)

    def do_removexattr(self, name: str, key: str) -> None:
        os.removexattr(self._at(name), key, follow_symlinks=False)

    def do_stat(self, name: str) -> tuple[Any, ...]:
        return seen(os.lstat(self._at(name)))

    def do_list(self, name: str) -> list[str]:
        return sorted(os.listdir(self._at(name)))

    def do_readlink(self, name: str) -> str:
        return os.readlink(self._at(name))

    # Data

    def do_read(self, name: str) -> bytes:
        fd = os.open(self._at(name), os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.read(fd, 1 << 20)
        finally:
            os.close(fd)

    def do_write(self, name: str, flags: int, mode: int, data: bytes) -> int:
        fd = os.open(self._at(name), flags | os.O_WRONLY | os.O_NONBLOCK, mode)
        try:
            self._touch(fd, os.O_WRONLY)
            return os.write(fd, data)
        finally:
            os.close(fd)

    def do_truncate(self, name: str, size: int) -> None:
        os.truncate(self._at(name), size)

    # Open files

    def do_open(self, slot: int, name: str, flags: int, mode: int) -> None:
        self.do_close(slot)
        self.open[slot] = os.open(self._at(name), flags | os.O_NONBLOCK, mode)
        self._touch(self.open[slot], flags)

    def _touch(self, fd: int, flags: int) -> None:
        if self.touches and flags & os.O_ACCMODE != os.O_RDONLY:
            os.utime(fd)

    def do_tmpfile(self, slot: int, name: str, mode: int) -> None:
        self.do_open(slot, name, os.O_TMPFILE | os.O_RDWR, mode)

    def do_close(self, slot: int) -> None:
        fd = self.open.pop(slot, -1)
        if fd >= 0:
            os.close(fd)

    def do_fdlink(self, slot: int, new: str) -> None:
        link_open(self._fd(slot), self._at(new))

    def do_fdstat(self, slot: int) -> tuple[Any, ...]:
        return seen(os.fstat(self._fd(slot)))

    def do_fdwrite(self, slot: int, offset: int, data: bytes) -> int:
        return os.pwrite(self._fd(slot), data, offset)

    def do_fdtruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self._fd(slot), size)

    def do_fdchmod(self, slot: int, mode: int) -> None:
        os.fchmod(self._fd(slot), mode)

    def do_fdpunch(self, slot: int, offset: int, size: int) -> None:
        fallocate(self._fd(slot), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)

    def _fd(self, slot: int) -> int:
        if slot not in self.open:
            raise OSError(errno.EBADF, "nothing is open there")
        return self.open[slot]


def seen(st: os.stat_result) -> tuple[Any, ...]:
    """What two trees must agree on: a time, and the room that data takes, only if nobody changed it.

    Not the links of directories: a merged one has one, and which are merged is up to who copied what up before failing.
    """
    when = st.st_mtime_ns if st.st_mtime < LONG_AGO + 10**6 else "now"
    shown = oct(st.st_mode), st.st_uid, st.st_gid, when, st.st_size, st.st_blksize
    if stat.S_ISDIR(st.st_mode):
        return shown
    return *shown, st.st_nlink, st.st_rdev, st.st_blocks if when != "now" else "some"


def numbers_of(layers: list[Path]) -> dict[int, str]:
    """A name, the same in equal layers, for each inode number of lower layers on one filesystem.

    Of a layer that was an upper, only that it is one: something that failed may have been copied up before it did.
    """
    names: dict[int, str] = {}
    written = any(layer.name.startswith("upper") for layer in layers)
    for place, layer in enumerate(layers):
        for directory, folders, files in os.walk(layer):
            folders.sort()
            for name in [".", *sorted((*folders, *files))]:
                path = os.path.join(directory, name)
                label = "below" if written else f"{place}:{os.path.relpath(path, layer)}"
                names.setdefault(os.lstat(path).st_ino, label)
    return names


def everything(twin: Twin) -> dict[str, Any]:
    """All names below the root, and what is seen of each: also from which lower file it has its inode number."""
    root = twin.root
    found: dict[str, Any] = {}
    todo = ["."]
    while todo:
        name = todo.pop()
        st = os.lstat(root / name)
        shown: list[Any] = [seen(st), twin.numbers.get(st.st_ino, "its own")]
        keys = os.listxattr(root / name, follow_symlinks=False)
        shown.append({key: os.getxattr(root / name, key, follow_symlinks=False) for key in sorted(keys)})
        if stat.S_ISDIR(st.st_mode):
            shown.append(names := twin.do_list(name))
            todo += [f"{name}/{child}" for child in names]
        elif stat.S_ISREG(st.st_mode):
            shown.append(twin.do_read(name))
        elif stat.S_ISLNK(st.st_mode):
            shown.append(twin.do_readlink(name))
        found[name] = shown
    return dict(sorted(found.items()))


def listed_otherwise(root: Path) -> list[str]:
    """Files whose number in a listing is not the one that stat(2) gives.

    The kernel has some where a directory of its upper was not made by an overlay.
    """
    found = []
    for directory, _, _ in os.walk(root):
        for entry in os.scandir(directory):
            if entry.inode() != os.lstat(entry.path).st_ino:
                found.append(entry.path)
    return found


# What is in layers, and what is done

NAMES = ("a", "b", "c")
paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
numbers = st.integers(0, 30)


class Some(NamedTuple):
    """A path to be found when the operation is done: one of those that are there, with a name added to it or not."""

    number: int
    name: str

    def find(self, there: list[str], folders: list[str]) -> str:
        if not self.name:
            return there[self.number % len(there)]
        return f"{folders[self.number % len(folders)]}/{self.name}"


old = st.builds(Some, numbers, st.just(""))
new = st.builds(Some, numbers, st.sampled_from(NAMES))
any_path = st.one_of(old, old, old, new, paths)


def resolve(operation: Operation, root: Path) -> Operation:
    """The operation with the paths that its `Some` stand for in the tree below `root`."""
    if not any(isinstance(argument, Some) for argument in operation):
        return operation
    there, folders = [], ["."]
    for directory in folders:
        for entry in sorted(os.scandir(root / directory), key=lambda entry: entry.name):
            there.append(f"{directory}/{entry.name}")
            if entry.is_dir(follow_symlinks=False):
                folders.append(there[-1])
    there = there or ["a"]
    return tuple(part.find(there, folders) if isinstance(part, Some) else part for part in operation)


modes = st.sampled_from((0o644, 0o600, 0o755, 0o777, 0o400, 0o4755, 0o2755, 0o2745))
folder_modes = st.sampled_from((0o755, 0o777, 0o700, 0o1777, 0o2777))
owners = st.sampled_from((0, USER, 1001))
contents = st.sampled_from((b"", b"x", b"some words\n", b"q" * 70))
keys = st.sampled_from(("user.one", "trusted.two", "security.three", "trusted.overlay.opaque", "user.overlay.origin"))

_THINGS = ("file", "file", "file", "dir", "dir", "dir", "symlink", "fifo", "whiteout", "opaque", "link")
things = st.tuples(st.sampled_from(_THINGS), paths, modes, folder_modes, owners, contents)
layer = st.lists(things, min_size=3, max_size=10)


def is_merged(root: Path, below: list[Path], name: str) -> bool:
    """Whether a directory of layer `root` hides something of the layers `below`."""
    for part in Path(name).parts:
        root = root / part
        if root.is_symlink():  # it leads to another directory, which need not be merged
            return False
        if "trusted.overlay.opaque" in os.listxattr(root):
            return False
        shown = []
        for lower in below:
            lower = lower / part
            if not lower.is_dir() or lower.is_symlink():
                if os.path.lexists(lower):
                    break
                continue
            shown.append(lower)
            if "trusted.overlay.opaque" in os.listxattr(lower):
                break
        below = shown
    return bool(below)


def build(root: Path, layer: list[tuple[Any, ...]], below: list[Path]) -> None:
    """Make what `layer` lists; what cannot be made after what was made before is left out.

    A whiteout only where a layer `below` has the directory: elsewhere the kernel would show it.
    """
    first_file: Path | None = None
    for kind, name, mode, folder_mode, owner, content in layer:
        path = root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(path):
                continue
            if kind == "file":
                path.write_bytes(content)
                first_file = first_file or path
            elif kind in ("dir", "opaque"):
                path.mkdir()
            elif kind == "symlink":
                path.symlink_to("b/c")
            elif kind == "fifo":
                os.mkfifo(path)
            elif kind == "whiteout":
                if is_merged(root, below, os.path.dirname(name)):
                    whiteout(path)
                continue
            elif kind == "link" and first_file is not None:
                os.link(first_file, path)
                continue
            else:
                continue
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
                raise
            continue
        os.lchown(path, owner, owner)
        if kind != "symlink":
            os.chmod(path, folder_mode if path.is_dir() else mode)
        if kind == "opaque":
            opaque(path)
        if kind == "file" and content == b"x":
            os.setxattr(path, "user.one", b"1")
    for directory, names, files in os.walk(root, topdown=False):
        for name in (*names, *files):
            os.utime(os.path.join(directory, name), (LONG_AGO, LONG_AGO + len(name)), follow_symlinks=False)
    os.utime(root, (LONG_AGO, LONG_AGO))


def _operation(verb: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Operation]:
    user = st.integers(0, 7).map(lambda number: number == 7)
    return st.tuples(st.just(verb), user, *arguments)


slots = st.integers(0, 2)
sizes = st.sampled_from((0, 1, 100, 4096, 10_000))
operations = st.one_of(
    _operation("mkdir", new, folder_modes),
    _operation("rmdir", any_path),
    _operation("unlink", any_path),
    _operation("symlink", new, st.sampled_from(("a", "../b", "c/none"))),
    _operation(
        "mknod", new,
        st.sampled_from((stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFREG)).map(lambda kind: kind | 0o666),
        st.sampled_from((0, os.makedev(1, 3))),
    ),
    _operation("link", old, new),
    _operation("rename", old, any_path, st.sampled_from((0, 0, 0, 1, 2, 4))),
    _operation("rename", old, any_path, st.just(0)),
    _operation("rename", old, new, st.just(0)),
    _operation("chmod", any_path, modes),
    _operation("chown", any_path, st.sampled_from((-1, 0, USER)), st.sampled_from((-1, 0, USER))),
    _operation("utime", any_path, st.just(LONG_AGO + 5)),
    _operation("setxattr", any_path, keys, st.sampled_from((b"", b"y")), st.sampled_from((0, 0, 1, 2))),
    _operation("getxattr", any_path, keys),
    _operation("removexattr", any_path, keys),
    _operation("stat", any_path),
    _operation("list", any_path),
    _operation("readlink", any_path),
    _operation("read", any_path),
    _operation(
        "write", any_path,
        st.sampled_from((0, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_CREAT | os.O_TRUNC)),
        modes, contents,
    ),
    _operation("truncate", any_path, sizes),
    _operation("open", slots, any_path, st.sampled_from((os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT)), modes),
    _operation("tmpfile", slots, any_path, modes),
    _operation("close", slots),
    _operation("fdlink", slots, new),
    _operation("fdstat", slots),
    _operation("fdwrite", slots, sizes, contents),
    _operation("fdtruncate", slots, sizes),
    _operation("fdchmod", slots, modes),
    _operation("fdpunch", slots, sizes, st.just(4096)),
)  # fmt: skip
