"""The guard's own directory is on a container's volume: it uses none that somebody has put in its place."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from overt.guard import places
from overt.guard.places import Place
from overt.guard.table import Mounted
from overt.host import files, mounts, private
from overt.upper import probes

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

UUID = b"0123456789abcdef"


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    at = tmp_path / "volume"
    at.mkdir()
    attach(mounts.new_mount("tmpfs", []), at)
    (at / "upper").mkdir()
    os.setxattr(at / "upper", "trusted.overlay.uuid", UUID)
    yield at
    mounts.umount(str(at), mounts.MNT_DETACH)


def attach(fd: int, at: Path) -> None:
    mounts.attach(fd, str(at))
    os.close(fd)


def find(upper: Path) -> Place:
    return places.find(Mounted(0, b"", os.fsencode(upper), b"", volatile=False), [], UUID)


def close(place: Place) -> None:
    assert place.close() is None


@pytest.mark.parametrize("how", ["owner", "mode", "link", "mount"])
def test_a_directory_that_is_exchanged_before_it_is_opened_is_not_taken(
    volume: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    host = volume / "host"
    host.mkdir(0o700)
    (host / "precious").write_text("the host's")
    real = os.mkdir
    mounted = []

    def mkdir(name: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        real(name, mode, dir_fd=dir_fd)
        made = volume / name
        made.rename(volume / "away")
        if how == "link":
            made.symlink_to(host)
            return
        real(made, 0o700)
        if how == "owner":
            os.chown(made, 1000, 1000)
        elif how == "mode":
            made.chmod(0o755)
        else:
            attach(mounts.clone(str(host)), made)
            mounted.append(made)

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", mkdir)
        with pytest.raises(private.Replaced):
            find(volume / "upper")
    for made in mounted:
        mounts.umount(str(made), mounts.MNT_DETACH)
    assert len(os.listdir("/proc/self/fd")) == before
    assert os.listdir(host) == ["precious"]
    close(find(volume / "upper"))


def test_an_upper_with_something_mounted_on_it_does_not_lead_to_where_that_is(volume: Path, tmp_path: Path) -> None:
    """What is beside the mount's place, of the same filesystem, is not beside the upper."""
    elsewhere = volume / "elsewhere"
    (elsewhere / "upper").mkdir(parents=True)
    attach(mounts.clone(str(volume / "upper")), elsewhere / "upper")
    try:
        with pytest.raises(FileNotFoundError):
            find(elsewhere / "upper")
        assert os.listdir(elsewhere) == ["upper"]
    finally:
        mounts.umount(str(elsewhere / "upper"), mounts.MNT_DETACH)


def test_what_somebody_has_put_into_it_stays_and_is_told(volume: Path) -> None:
    place = find(volume / "upper")
    (volume / place.name / "theirs").mkdir()
    why = place.close()
    assert isinstance(why, OSError) and os.listdir(volume / place.name) == ["theirs"]


@pytest.mark.parametrize("ours", ["mounted here", "not mounted here"])
def test_an_upper_that_only_another_namespace_names_is_used_through_a_mount_of_our_own(
    volume: Path, tmp_path: Path, ours: str
) -> None:
    """On another namespace's mount the kernel mounts no probe."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    words = ["unshare", "-m", "sh", "-c", 'mount --bind "$1" "$2" && echo ready && exec sleep 50', "sh"]
    other = subprocess.Popen([*words, str(volume), str(theirs)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"ready\n"
        if ours == "not mounted here":
            mounts.umount(str(volume), mounts.MNT_DETACH)
        mounted = Mounted(0, b"", os.fsencode(theirs / "upper"), b"", volatile=False)
        place = places.find(mounted, [other.pid], UUID)
        try:
            if ours == "mounted here":
                root = probes.mount(place.scratch, volatile=True)
                files.syncfs(root)
                os.close(root)
                assert place.name in os.listdir(volume)
            else:
                with pytest.raises(OSError, match="Invalid argument"):
                    probes.mount(place.scratch, volatile=True)
        finally:
            close(place)
    finally:
        other.kill()
        other.communicate(timeout=20)
        if ours == "not mounted here":
            mounts.attach(mounts.new_mount("tmpfs", []), str(volume))
