"""Probes stand on directories that somebody else may write to: a container's, on a volume of its own."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from overt.host import files, mounts, private
from overt.upper import probes

from .stage import Stage

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

PARTS = ("upper", "work")
DIRTY = "work/work/incompat/volatile/dirty"


class Meddler:
    """Puts symbolic links to a directory of the host's in the place of a probe's parts, at a moment it is told."""

    def __init__(self, root: Path) -> None:
        self.host, self.volume = root / "host", root / "volume"
        self.volume.mkdir()
        for file in ("upper/precious", "work/work/precious", DIRTY):
            (self.host / file).parent.mkdir(parents=True, exist_ok=True)
            (self.host / file).write_text("the host's")

    def swap(self) -> None:
        (probe,) = self.volume.glob("probe-*")
        for part in PARTS:
            (probe / part).rename(self.volume / f"its own {part}")
            (probe / part).symlink_to(self.host / part)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.host)) for path in self.host.rglob("*") if path.is_file()}


@pytest.mark.parametrize("volatile", [True, False], ids=["volatile", "ordinary"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_container_puts_in_place_of_a_probes_directories_is_left_alone(
    ext4: Stage, monkeypatch: pytest.MonkeyPatch, when: str, volatile: bool
) -> None:
    """The kernel empties the directory that it is given to work in, and we remove what it has made."""
    meddler = Meddler(ext4.root)
    before = meddler.files()
    assert len(before) == 3
    real = mounts.new_mount

    def new_mount(kind: str, options: list[tuple[str, str | int | None]]) -> int:
        if when == "before":
            meddler.swap()
        fd = real(kind, options)
        if when == "after":
            meddler.swap()
        return fd

    monkeypatch.setattr(probes.mounts, "new_mount", new_mount)
    scratch = os.open(meddler.volume, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.close(probes.mount(scratch, volatile=volatile))
    finally:
        os.close(scratch)
    assert meddler.files() == before
    (left,) = meddler.volume.glob("probe-*")
    assert {path.name for path in left.iterdir()} == set(PARTS)
    assert all(path.is_symlink() for path in left.iterdir())


class Swapper:
    """Exchanges a directory for what somebody else has prepared, when it was made and is not opened yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, prefix: str, prepare: Callable[[Path], None]) -> None:
        self.swapped: list[Path] = []
        self._prefix = prefix
        self._prepare = prepare
        self._mkdir = os.mkdir
        monkeypatch.setattr(os, "mkdir", self.mkdir)

    def mkdir(self, path: str | Path, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._mkdir(path, mode, dir_fd=dir_fd)
        if dir_fd is not None and str(path).startswith(self._prefix) and not self.swapped:
            made = Path(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
            self.swapped.append(made)
            made.rename(made.with_name("away"))
            self._prepare(made)


def prepare(kind: str, host: Path) -> Callable[[Path], None]:
    def other_owner(made: Path) -> None:
        made.mkdir(0o700)
        os.chown(made, 1000, 1000)

    def open_to_all(made: Path) -> None:
        made.mkdir(0o700)
        made.chmod(0o777)

    def link(made: Path) -> None:
        made.symlink_to(host)

    def mount(made: Path) -> None:
        made.mkdir(0o700)
        bind(host, made)

    return {"other owner": other_owner, "open to all": open_to_all, "link": link, "mount": mount}[kind]


def bind(what: Path, at: Path) -> None:
    fd = mounts.clone(str(what))
    try:
        mounts.attach(fd, str(at))
    finally:
        os.close(fd)


@pytest.mark.parametrize("kind", ["other owner", "open to all", "link", "mount"])
@pytest.mark.parametrize("part", ["probe-", "lower", "upper", "work"])
def test_a_directory_that_is_another_by_the_time_it_is_opened_is_not_used(
    ext4: Stage, monkeypatch: pytest.MonkeyPatch, part: str, kind: str
) -> None:
    """Who may write there exchanges it, or mounts a directory of the host's over it, in between."""
    host, volume = ext4.root / "host", ext4.root / "volume"
    volume.mkdir()
    (host / "work").mkdir(parents=True, mode=0o700)
    host.chmod(0o700)
    (host / "work" / "precious").write_text("the host's")
    swapper = Swapper(monkeypatch, part, prepare(kind, host))
    scratch = os.open(volume, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(private.Replaced):
            probes.mount(scratch, volatile=True)
    finally:
        os.close(scratch)
        if kind == "mount" and swapper.swapped:
            mounts.umount(str(swapper.swapped[0]), mounts.MNT_DETACH)
    assert os.listdir(host) == ["work"] and os.listdir(host / "work") == ["precious"]


def test_what_is_mounted_below_a_probe_is_not_removed_with_it(ext4: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of its own in the place of the probe's, with the host's mounted at a name of ours and at another."""
    host, volume = ext4.root / "host", ext4.root / "volume"
    volume.mkdir()
    for file in ("secret", "work/incompat/volatile/dirty"):
        (host / file).parent.mkdir(parents=True, exist_ok=True)
        (host / file).write_text("the host's")
    before = sorted(host.rglob("*"))
    mounted: list[Path] = []
    real = mounts.new_mount

    def new_mount(kind: str, options: list[tuple[str, str | int | None]]) -> int:
        fd = real(kind, options)
        (probe,) = volume.glob("probe-*")
        for name in ("work", "unknown"):
            if (probe / name).exists():
                (probe / name).rename(volume / f"our {name}")
            (probe / name).mkdir()
            bind(host, probe / name)
            mounted.append(probe / name)
        return fd

    monkeypatch.setattr(probes.mounts, "new_mount", new_mount)
    scratch = os.open(volume, os.O_RDONLY | os.O_DIRECTORY)
    try:
        root = probes.mount(scratch, volatile=True)
    finally:
        os.close(scratch)
        for at in mounted:
            mounts.umount(str(at), mounts.MNT_DETACH)
    files.syncfs(root)  # it stands all the same
    os.close(root)
    assert sorted(host.rglob("*")) == before
    assert sorted(path.name for path in volume.glob("probe-*/*")) == ["unknown", "work"]


def test_nothing_is_removed_that_is_not_known_by_name(ext4: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that is refused, and a directory that somebody has put into it."""
    volume = ext4.root / "volume"
    volume.mkdir()

    def new_mount(kind: str, options: list[tuple[str, str | int | None]]) -> int:
        (probe,) = volume.glob("probe-*")
        (probe / "more" / "deeper").mkdir(parents=True)
        raise OSError(22, "refused")

    def rmtree(path: str, **options: object) -> None:
        raise AssertionError("a whole tree is removed")

    monkeypatch.setattr(probes.mounts, "new_mount", new_mount)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    scratch = os.open(volume, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(OSError, match="refused"):
            probes.mount(scratch, volatile=True)
    finally:
        os.close(scratch)
    assert [path.name for path in volume.glob("probe-*/*")] == ["more"]


def test_meddling_with_one_overlays_directory_takes_no_probes_from_the_others(
    ext4: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ext4.root / "host"
    host.mkdir()
    with monkeypatch.context() as patch:
        Swapper(patch, "probe-", prepare("other owner", host))
        with pytest.raises(private.Replaced):
            ext4.attach()
    upper, _ = ext4.attach()
    assert (upper.eyes, upper.refused) == ("probes+trace", "")
