"""A lower layer made by somebody who wants to be let out of it: nothing leads outside."""

import contextlib
import errno
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from overt.host import mounts

from .ground import Layers, as_user, marks, opaque, whiteout

SECRET = "not for this overlay"


@pytest.fixture
def outside(layers: Layers) -> Path:
    """What no operation on the overlay may show or change."""
    place = layers.place / "outside"
    place.mkdir()
    (place / "secret").write_text(SECRET)
    return place


def untouched(outside: Path) -> bool:
    return os.listdir(outside) == ["secret"] and (outside / "secret").read_text() == SECRET


@pytest.mark.parametrize("up", ["absolute", "relative"])
def test_symlinks_are_followed_by_the_caller_and_never_by_the_server(layers: Layers, outside: Path, up: str) -> None:
    """A caller in a container follows a link inside its own root; here that is the machine's: only no-follow calls."""
    target = str(outside) if up == "absolute" else "../outside"
    for name in ("dir", "dir2"):
        os.symlink(target, layers.lower / name)
    os.symlink(f"{target}/secret", layers.lower / "file")
    (layers.upper / "merged").mkdir()
    (layers.lower / "merged").symlink_to(target)
    root = layers.mount()
    assert os.readlink(root / "dir") == target
    assert os.listdir(root / "merged") == []
    os.lchown(root / "dir", 7, 7)
    os.utime(root / "file", (1, 1), follow_symlinks=False)
    os.setxattr(root / "file", "trusted.x", b"1", follow_symlinks=False)
    os.rename(root / "dir", root / "moved")
    os.link(root / "file", root / "again", follow_symlinks=False)
    os.unlink(root / "dir2")
    os.mkdir(root / "dir2")
    (root / "dir2" / "new").touch()
    (root / "merged" / "new").touch()
    for name in ("moved", "again", "file"):
        assert stat.S_ISLNK(os.lstat(layers.upper / name).st_mode)
    assert untouched(outside)
    assert os.stat(outside).st_uid == 0
    assert "trusted.x" not in os.listxattr(outside / "secret")


def test_a_directory_that_becomes_a_symlink_behind_our_back_is_not_followed(layers: Layers, outside: Path) -> None:
    """Layers must not be changed while they are mounted. Who does it all the same gets errors, not what is outside."""
    (layers.lower / "dir" / "sub").mkdir(parents=True)
    (layers.lower / "dir" / "sub" / "secret").write_text("inside")
    root = layers.mount()
    os.listdir(root / "dir")
    os.rename(layers.lower / "dir" / "sub", layers.lower / "away")
    os.symlink(outside, layers.lower / "dir" / "sub")
    for call in (lambda: (root / "dir/sub/secret").read_text(), lambda: (root / "dir/sub/secret").write_text("x")):
        try:
            assert call() != SECRET
        except OSError:
            continue
    assert untouched(outside)


def test_dots_do_not_lead_up(layers: Layers) -> None:
    (layers.lower / "dir").mkdir()
    root = layers.mount()
    assert os.stat(root / "dir" / "..").st_ino == os.stat(root).st_ino
    here = os.getcwd()
    os.chdir(root / "dir")
    try:
        os.rmdir(root / "dir")
        assert os.listdir(".") == []
        with pytest.raises(FileNotFoundError):
            Path("new").touch()
    finally:
        os.chdir(here)


def test_devices_of_a_layer_are_the_mounts_business(layers: Layers) -> None:
    """With nodev nobody opens them; the server itself never does."""
    layers.options = "nodev"
    for name, kind, number in (
        ("null", stat.S_IFCHR, (1, 3)),
        ("memory", stat.S_IFCHR, (1, 1)),
        ("disk", stat.S_IFBLK, (7, 0)),
    ):
        os.mknod(layers.lower / name, kind | 0o666, os.makedev(*number))
    root = layers.mount()
    for name in ("null", "memory", "disk"):
        st = os.lstat(root / name)
        assert st.st_rdev == os.lstat(layers.lower / name).st_rdev
        with pytest.raises(PermissionError):
            os.open(root / name, os.O_RDONLY)
        os.chown(root / name, 3, 3)
        assert os.lstat(layers.upper / name).st_rdev == st.st_rdev
        os.unlink(root / name)


def test_fifos_and_sockets_do_not_hold_the_server_up(layers: Layers) -> None:
    os.mkfifo(layers.lower / "fifo")
    os.mknod(layers.lower / "socket", stat.S_IFSOCK | 0o666)
    root = layers.mount()
    with pytest.raises(OSError) as raised:
        os.open(root / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    assert raised.value.errno == errno.ENXIO
    fd = os.open(root / "fifo", os.O_RDWR)  # an open FIFO is the caller's kernel's own
    os.write(fd, b"through")
    os.chmod(root / "fifo", 0o600)
    assert os.read(fd, 10) == b"through"
    os.close(fd)
    with pytest.raises(OSError) as raised:
        os.truncate(root / "fifo", 5)
    assert raised.value.errno == errno.EINVAL
    os.chmod(root / "socket", 0o600)
    os.rename(root / "socket", root / "moved")
    assert stat.S_ISFIFO(os.lstat(layers.upper / "fifo").st_mode)
    assert stat.S_ISSOCK(os.lstat(layers.upper / "moved").st_mode)


def test_setuid_programs_of_a_layer_obey_nosuid(layers: Layers) -> None:
    layers.options = "nosuid"
    program = layers.lower / "id"
    program.write_bytes(Path("/usr/bin/id").read_bytes())
    program.chmod(0o4755)
    root = layers.mount()
    assert as_user(1000, lambda: os.popen(f"{root}/id -u").read()) == "1000\n"


def test_strange_marks_are_borne(layers: Layers) -> None:
    """Marks where none belong, with values that mean nothing."""
    (layers.lower / "dir").mkdir()
    (layers.lower / "dir" / "file").write_text("text")
    opaque(layers.lower / "dir", b"maybe" * 50)
    for name, value in (
        ("metacopy", b""),
        ("redirect", b"/../../etc"),
        ("origin", b"\xff" * 200),
        ("upper", b"/"),
        ("nlink", b"U+9"),
    ):
        os.setxattr(layers.lower / "dir" / "file", f"trusted.overlay.{name}", value)
        os.setxattr(layers.lower / "dir", f"trusted.overlay.{name}", value)
    whiteout(layers.lower / "nothing")
    root = layers.mount()
    assert os.listdir(root) == ["dir"]
    assert (root / "dir" / "file").read_text() == "text"
    assert os.listxattr(root / "dir" / "file") == []
    (root / "nothing").write_text("something")
    os.chmod(root / "dir" / "file", 0o600)
    assert marks(layers.upper / "dir" / "file") == {"trusted.overlay.origin"}
    assert os.getxattr(layers.upper / "dir" / "file", "trusted.overlay.origin") != b"\xff" * 200


def kernel_upper(layers: Layers, options: str, change: Callable[[Path], object]) -> None:
    """Have the kernel change the tree with features of its own, and take it for overt's upper."""
    words = f"{layers.words},index=off,xino=off,{options}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", words, layers.path], check=True, timeout=30)
    try:
        change(layers.path)
    finally:
        mounts.umount(layers.path)


def test_files_copied_up_without_their_data_are_refused_not_shown_as_zeros(layers: Layers) -> None:
    (layers.lower / "dir").mkdir()
    (layers.lower / "dir" / "file").write_text("data" * 5000)
    (layers.lower / "dir" / "other").write_text("text")
    kernel_upper(layers, "metacopy=on", lambda root: os.chmod(root / "dir" / "file", 0o600))
    assert marks(layers.upper / "dir" / "file")
    root = layers.mount()
    for _ in range(2):
        with pytest.raises(PermissionError):
            (root / "dir" / "file").read_bytes()
        assert sorted(os.listdir(root / "dir")) == ["file", "other"]
        assert sorted(entry.name for entry in os.scandir(root / "dir")) == ["file", "other"]
    assert (root / "dir" / "other").read_text() == "text"


@pytest.mark.parametrize("target", ["moved", "new/moved"])
def test_redirected_directories_are_refused_not_shown_without_their_files(layers: Layers, target: str) -> None:
    """Where redirects are not to be followed."""
    layers.features = "redirect_dir=nofollow"
    (layers.lower / "dir").mkdir()
    (layers.lower / "dir" / "file").write_text("text")

    def change(root: Path) -> None:
        (root / "new").mkdir()
        os.rename(root / "dir", root / target)

    kernel_upper(layers, "redirect_dir=on,metacopy=off", change)
    root = layers.mount()
    for _ in range(2):
        with pytest.raises(PermissionError):
            os.listdir(root / target)
        assert os.path.basename(target) in os.listdir((root / target).parent)
    assert not (root / "dir").exists()


def test_what_is_mounted_on_a_layer_is_not_in_it(layers: Layers, outside: Path) -> None:
    """As in the kernel: a layer is one mount, and no door to others."""
    (layers.lower / "dir").mkdir()
    (layers.lower / "dir" / "below").write_text("below")
    (layers.lower / "dir2").mkdir()
    tree = mounts.clone(str(outside))
    mounts.attach(tree, str(layers.lower / "dir"))
    os.close(tree)
    try:
        root = layers.mount()
        assert os.listdir(root / "dir") == ["below"]
        (root / "dir" / "new").touch()
        tree = mounts.clone(str(outside))
        mounts.attach(tree, str(layers.lower / "dir2"))
        os.close(tree)
        try:
            assert os.listdir(root / "dir2") == []
            (root / "dir2" / "new").touch()
        finally:
            mounts.umount(str(layers.lower / "dir2"))
    finally:
        mounts.umount(str(layers.lower / "dir"))
    assert untouched(outside)


def test_a_file_that_becomes_a_fifo_behind_our_back_does_not_stop_the_server(layers: Layers) -> None:
    (layers.lower / "file").write_text("text")
    root = layers.mount()
    os.stat(root / "file")
    os.unlink(layers.lower / "file")
    os.mkfifo(layers.lower / "file")
    for flags in (os.O_RDONLY, os.O_RDWR):
        with contextlib.suppress(OSError):
            os.close(os.open(root / "file", flags))
    (root / "other").write_text("the server lives")
