"""Layers on a filesystem of the session's own, mounted by overt or by the kernel's overlayfs."""

import ctypes
import hashlib
import os
import pickle
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from overt.host import mounts
from overt.lab.filesystems import FILESYSTEMS
from overt.server.client import Client

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

KERNEL = "redirect_dir=off,metacopy=off,index=off,xino=off"


class Ground(NamedTuple):
    """Where layers can be, and the server that mounts them."""

    directory: Path
    client: Client


class Layers:
    """Layers of one overlay, and the places where it is mounted: `path` by overt, `kernel` by the kernel.

    Both are never mounted at once.
    """

    def __init__(self, ground: Ground, *, lowers: int = 1, options: str = "", features: str = "") -> None:
        """`options` are overt's alone, `features` what both are mounted with."""
        self.client = ground.client
        self.options = options
        self.features = features
        self.place = Path(tempfile.mkdtemp(dir=ground.directory))
        self.place.chmod(0o755)
        self.lowers = [self.place / f"lower{number}" for number in range(lowers)]
        self.upper = self.place / "upper"
        self.work = self.place / "work"
        self.path = self.place / "mnt"
        for directory in (*self.lowers, self.upper, self.work, self.path):
            directory.mkdir()

    @property
    def lower(self) -> Path:
        """The topmost lower layer."""
        return self.lowers[0]

    @property
    def words(self) -> str:
        """The layers as mount -o has them."""
        return f"lowerdir={':'.join(map(str, self.lowers))},upperdir={self.upper},workdir={self.work}"

    def mount(self) -> Path:
        """Mount by overt."""
        self.client.mount(str(self.path), ",".join(filter(None, (self.words, self.features, self.options))))
        return self.path

    def umount(self) -> None:
        """Unmount, and show that nothing is left in the work directory."""
        self.client.umount(str(self.path))
        assert set(os.listdir(self.work)) <= {"work", "index"}
        assert set(os.listdir(self.work / "work")) <= {"incompat"}

    @contextmanager
    def kernel(self) -> Iterator[Path]:
        """The same layers mounted by the kernel; what overt has mounted is unmounted first."""
        if os.path.ismount(self.path):
            self.umount()
        self.forget_volatile()
        asked = {option.partition("=")[0] for option in self.features.split(",")}
        if "metacopy=on" in self.features:
            asked.add("redirect_dir")  # it is on then, and off would contradict it
        rest = [option for option in KERNEL.split(",") if option.partition("=")[0] not in asked]
        words = ",".join(filter(None, (self.words, self.features, *rest)))
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", words, str(self.path)], check=True, timeout=30)
        try:
            yield self.path
        finally:
            mounts.umount(self.path)

    def forget_volatile(self) -> None:
        """What a volatile mount left does not matter, and may be mounted again."""
        shutil.rmtree(self.work / "work" / "incompat", ignore_errors=True)

    def stack(self) -> None:
        """What was the upper becomes the topmost lower layer, under a new upper. Not while it is mounted."""
        number = len(self.lowers)
        self.lowers.insert(0, self.upper)
        self.upper, self.work = self.place / f"upper{number}", self.place / f"work{number}"
        self.upper.mkdir()
        self.work.mkdir()

    def close(self) -> None:
        """Take everything away, by force where a test has failed."""
        if os.path.ismount(self.path):
            mounts.umount(self.path, mounts.MNT_DETACH)
        subprocess.run(["rm", "-rf", "--one-file-system", str(self.place)], check=True, timeout=60)


@contextmanager
def other_ground(ground: Ground, kind: str, place: Path) -> Iterator[Ground]:
    """The same server, and an image of another filesystem."""
    row = FILESYSTEMS[kind]
    if shutil.which(row.make[0]) is None:
        pytest.skip(f"no {row.make[0]} (Debian: {row.package})")
    image, point = place / "image", place / "mnt"
    image.touch()
    os.truncate(image, 512 << 20)
    point.mkdir()
    subprocess.run([*row.make, image], check=True, capture_output=True, timeout=60)
    subprocess.run(["mount", "-o", "loop", image, point], check=True, timeout=60)
    try:
        yield Ground(point, ground.client)
    finally:
        mounts.umount(str(point), mounts.MNT_DETACH)


# What a tree shows


def describe(root: Path) -> dict[str, tuple[Any, ...]]:
    """All that can be seen of a tree and does not depend on when it was made."""
    return dict(sorted(_describe(root, ".")))


def _describe(root: Path, name: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    path = root / name
    st = os.lstat(path)
    kind = stat.S_IFMT(st.st_mode)
    shown: list[Any] = [oct(st.st_mode), st.st_uid, st.st_gid, xattrs(path)]
    names: list[str] = []
    if kind == stat.S_IFDIR:
        names = sorted(os.listdir(path))
        shown.append(names)
    else:
        shown.append(st.st_nlink)
    if kind == stat.S_IFREG:
        shown += [st.st_size, hashlib.sha256(path.read_bytes()).hexdigest()[:12]]
    elif kind == stat.S_IFLNK:
        shown.append(os.readlink(path))
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        shown.append(st.st_rdev)
    yield name, tuple(shown)
    for child in names:
        yield from _describe(root, f"{name}/{child}")


def xattrs(path: Path) -> dict[str, bytes]:
    """A file's extended attributes."""
    names = os.listxattr(path, follow_symlinks=False)
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in sorted(names)}


def whiteout(path: Path) -> None:
    """Make what says in a layer that a name is gone."""
    os.mknod(path, stat.S_IFCHR, 0)


def is_whiteout(path: Path) -> bool:
    """Whether a layer has a whiteout at `path`."""
    st = os.lstat(path)
    return stat.S_ISCHR(st.st_mode) and st.st_rdev == 0


def opaque(path: Path, value: bytes = b"y") -> None:
    """Mark a layer's directory as hiding what is below."""
    os.setxattr(path, "trusted.overlay.opaque", value)


def marks(path: Path) -> set[str]:
    """The overlay's own xattrs of a layer's file."""
    return {name for name in os.listxattr(path, follow_symlinks=False) if name.startswith("trusted.overlay.")}


# Others


def link_open(fd: int, new: Path) -> None:
    """Give an open file a name (linkat(2) with AT_SYMLINK_FOLLOW, which os.link uses only with a directory)."""
    directory = os.open(new.parent, os.O_PATH)
    try:
        os.link(f"/proc/self/fd/{fd}", new.name, dst_dir_fd=directory, follow_symlinks=True)
    finally:
        os.close(directory)


def as_user(uid: int, call: Callable[[], Any], *, gid: int | None = None, groups: tuple[int, ...] = ()) -> Any:
    """What `call` returns, or raises, in a process of another user (gid: the same number by default)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups(groups)
            os.setresgid(*[uid if gid is None else gid] * 3)
            os.setresuid(uid, uid, uid)
            try:
                result = True, call()
            except OSError as error:
                result = False, OSError(error.errno, error.strerror)
            os.write(writing, pickle.dumps(result))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    good, value = pickle.loads(answer)
    if not good:
        raise value
    return value
