"""An upper with room for so many more blocks and inodes, and one more each time: whatever runs out, and in the midst of
whatever, is an error, and nothing has happened. On tmpfs that is ENOSPC, and a quota makes it EDQUOT.
"""

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overt.host import mounts

from .ground import Ground, Layers, describe

pytestmark = pytest.mark.timeout(120)

UNLIMITED = 1 << 20
LARGE = b"l" * 20_000


class Room:
    """A filesystem for an upper, in which room can be made scarce."""

    code = 0

    def __init__(self, point: Path) -> None:
        self.point = point

    def used(self, place: Path) -> tuple[int, int]:
        """Blocks of 4 KiB, and inodes."""
        st = os.statvfs(place)
        return (st.f_blocks - st.f_bfree) * st.f_frsize // 4096, st.f_files - st.f_ffree

    def allow(self, blocks: int, inodes: int) -> None:
        raise NotImplementedError

    def spare(self, place: Path, blocks: int, inodes: int) -> None:
        """Let there be room for so many more."""
        used = self.used(place)
        self.allow(used[0] + blocks, used[1] + inodes)


class Tmpfs(Room):
    code = errno.ENOSPC

    def allow(self, blocks: int, inodes: int) -> None:
        words = f"remount,size={blocks * 4096},nr_inodes={inodes}"
        subprocess.run(["mount", "-o", words, self.point], check=True, timeout=30)


class Quota(Room):
    """A subvolume of btrfs with a limit. What counts as used is known a moment later, so this goes up from nothing."""

    code = errno.EDQUOT

    def allow(self, blocks: int, inodes: int) -> None:
        subprocess.run(
            ["btrfs", "qgroup", "limit", str(blocks * 4096), "0/256", self.point.parent], check=True, timeout=30
        )

    def spare(self, place: Path, blocks: int, inodes: int) -> None:
        self.allow(1 + 16 * blocks, inodes)


@contextmanager
def btrfs(directory: Path) -> Iterator[Path]:
    """A new one, with quotas; a subvolume."""
    image, point = directory / "image", directory / "mnt"
    with open(image, "wb") as file:
        file.truncate(256 << 20)
    for words in (["mkfs.btrfs", "-q", image], ["mount", "-o", "loop", image, point]):
        subprocess.run(words, check=True, timeout=60, capture_output=True)
    try:
        for words in (["quota", "enable", point], ["subvolume", "create", point / "volume"]):
            subprocess.run(["btrfs", *words], check=True, timeout=60, capture_output=True)
        yield point / "volume"
    finally:
        mounts.umount(point, mounts.MNT_DETACH)


@contextmanager
def tmpfs(directory: Path) -> Iterator[Path]:
    mounts.attach(mounts.new_mount("tmpfs", [("mode", "755")]), directory / "mnt")
    try:
        yield directory / "mnt"
    finally:
        mounts.umount(directory / "mnt", mounts.MNT_DETACH)


@pytest.fixture
def room(request: pytest.FixtureRequest, ground: Ground) -> Iterator[Room]:
    with tempfile.TemporaryDirectory(dir=ground.directory.parent) as name:
        (Path(name) / "mnt").mkdir()
        if request.param == "tmpfs":
            with tmpfs(Path(name)) as point:
                yield Tmpfs(point)
        elif shutil.which("mkfs.btrfs") is None or "btrfs" not in Path("/proc/filesystems").read_text():
            pytest.skip("no mkfs.btrfs, or no btrfs in the kernel")
        else:
            with btrfs(Path(name)) as point:
                yield Quota(point)


def make_lower(place: Path) -> None:
    place.mkdir()
    (place / "file").write_bytes(LARGE)
    (place / "second").write_bytes(LARGE)
    (place / "third").write_bytes(LARGE)
    (place / "fourth").write_bytes(LARGE)
    os.setxattr(place / "second", "trusted.note", b"n" * 3000)
    (place / "dir").mkdir()
    (place / "dir" / "gone").touch()
    (place / "empty").mkdir()


CHANGES: dict[str, Callable[[Path], object]] = {
    "create": lambda place: os.close(os.open(place / "new", os.O_CREAT | os.O_EXCL)),
    "mkdir": lambda place: os.mkdir(place / "newdir"),
    "symlink": lambda place: os.symlink("x" * 2000, place / "newlink"),
    "mkfifo": lambda place: os.mkfifo(place / "newfifo"),
    "open": lambda place: os.close(os.open(place / "file", os.O_RDWR)),
    "chmod": lambda place: os.chmod(place / "second", 0o600),
    "link": lambda place: os.link(place / "third", place / "linked"),
    "rename": lambda place: os.rename(place / "fourth", place / "moved"),
    "setxattr": lambda place: os.setxattr(place / "file", "trusted.note", b"n" * 3000),
    "unlink": lambda place: os.unlink(place / "dir" / "gone"),
    "rmdir": lambda place: os.rmdir(place / "empty"),
    "over a whiteout": lambda place: os.mkdir(place / "empty"),
    "rename over": lambda place: os.rename(place / "new", place / "file"),
}


@pytest.mark.parametrize(
    ("room", "scarce"), [("tmpfs", "blocks"), ("tmpfs", "inodes"), ("quota", "blocks")], indirect=["room"]
)
def test_wherever_room_runs_out_nothing_has_happened(room: Room, ground: Ground, scarce: str) -> None:
    layers = Layers(Ground(room.point, ground.client))
    try:
        make_lower(layers.lower / "of")
        root = layers.mount()
        failed: dict[str, int] = dict.fromkeys(CHANGES, 0)
        for name, change in CHANGES.items():
            for spare in range(30):
                before = describe(root)
                room.spare(layers.upper, *(spare, 1000) if scarce == "blocks" else (1000, spare))
                try:
                    change(root / "of")
                    break
                except OSError as error:
                    assert error.errno == room.code, name
                    failed[name] += 1
                finally:
                    room.allow(UNLIMITED, UNLIMITED)
                assert describe(root) == before, (name, spare)
                assert os.listdir(layers.work / "work") == [], (name, spare)
            else:
                raise AssertionError(f"{name} wants more than any program has")
        expected = describe(root)
        layers.umount()
        assert describe(layers.mount()) == expected
        print(failed)
        assert sum(count > 0 for count in failed.values()) >= 5, failed
    finally:
        layers.close()
