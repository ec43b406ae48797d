"""A lower layer made by somebody who wants to be let out of it: nothing leads outside."""

import contextlib
import errno
import os
import random
import select
import stat
import subprocess
import time
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


@pytest.mark.parametrize("data", ["", "nopassthrough"])
def test_a_file_that_becomes_a_symlink_behind_our_back_is_not_followed(
    layers: Layers, outside: Path, data: str
) -> None:
    layers.options = data
    for name in ("read", "written"):
        (layers.lower / name).write_text("inside, and as long as a secret")
    root = layers.mount()
    for name, flags in (("read", os.O_RDONLY), ("written", os.O_RDWR)):
        os.stat(root / name)
        os.unlink(layers.lower / name)
        os.symlink(outside / "secret", layers.lower / name)
        with contextlib.suppress(OSError):
            fd = os.open(root / name, flags)
            try:
                assert SECRET.encode() not in os.read(fd, 100)
            finally:
                os.close(fd)
    assert untouched(outside)


def meddle(layer: Path, outside: Path, seed: int, stop: int) -> None:
    """Change a layer as nobody should who has mounted it, until `stop` is readable; links of ours lead us nowhere."""
    os.chroot(layer)
    layer = Path("/")
    chance = random.Random(seed)
    directories = ["a", "b", "a/c"]
    names = [f"{directory}/{name}" for directory in directories for name in "xyz"]

    def any_path() -> Path:
        return layer / (chance.choice(names) if chance.random() < 0.98 else chance.choice(directories))

    def write() -> None:
        fd = os.open(any_path(), os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK)  # it may be a FIFO
        try:
            os.write(fd, chance.randbytes(chance.choice((0, 10, 30_000))))
        finally:
            os.close(fd)

    ways_out = ["../../outside", "../../outside/secret", outside, outside / "secret"]

    def lead_out(path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.symlink(chance.choice(ways_out), path)

    calls: list[Callable[[], object]] = [
        write,
        write,
        lambda: os.unlink(any_path()),
        lambda: os.rmdir(any_path()),
        lambda: os.rename(any_path(), layer / f"away{chance.random()}"),
        lambda: os.rename(any_path(), any_path()),
        lambda: any_path().mkdir(),
        lambda: os.truncate(any_path(), chance.choice((0, 5000))),
        lambda: lead_out(any_path()),
        lambda: lead_out(any_path()),
        lambda: os.mkfifo(any_path()),
        lambda: whiteout(any_path()),
        lambda: opaque(any_path()),
        lambda: os.setxattr(any_path(), "trusted.overlay.redirect", b"/../outside"),
        lambda: os.chmod(any_path(), chance.choice((0, 0o600, 0o777))),
        lambda: os.link(any_path(), any_path()),
    ]
    while not select.select([stop], [], [], 0)[0]:
        for directory in directories:
            with contextlib.suppress(OSError):
                (layer / directory).mkdir()
        with contextlib.suppress(OSError):
            chance.choice(calls)()


NONSENSE = {errno.EFAULT, errno.EBADF, errno.ENOSYS, errno.ENOTCONN, errno.EPROTO}
"""what a program must not be told because somebody has changed a layer. EIO it may be: of an inode that is of another
kind all at once (fuse_stale_inode), of a file that becomes shorter while it is copied."""


def look_around(root: Path, seed: int, seconds: float, *, changes: bool) -> set[int]:
    """Do what programs do in a container whose root it is; the errors that came of it."""
    os.chroot(root)
    root = Path("/")
    chance = random.Random(seed)
    deadline = time.monotonic() + seconds
    codes: set[int] = set()

    def any_path() -> Path:
        return root / chance.choice(["a", "b", "a/c"]) / chance.choice("xyz")

    def read(flags: int) -> None:
        fd = os.open(any_path(), flags | os.O_NONBLOCK)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                if not flags & os.O_WRONLY:
                    assert SECRET.encode() not in os.read(fd, 100)
                if flags != os.O_RDONLY:
                    os.write(fd, b"overlay")
        finally:
            os.close(fd)

    calls: list[Callable[[], object]] = [
        lambda: read(os.O_RDONLY),
        lambda: os.listdir(any_path().parent),
        lambda: [entry.stat(follow_symlinks=False) for entry in os.scandir(any_path().parent)],
        lambda: os.lstat(any_path()),
        lambda: os.listxattr(any_path(), follow_symlinks=False),
    ]
    if changes:
        calls += [
            lambda: read(os.O_RDWR),
            lambda: read(os.O_WRONLY | os.O_TRUNC),
            lambda: os.lchown(any_path(), 0, 0),
            lambda: os.rename(any_path(), any_path()),
            lambda: os.unlink(any_path()),
            lambda: os.mkdir(any_path()),
            lambda: os.rmdir(any_path()),
            lambda: os.link(any_path(), any_path(), follow_symlinks=False),
        ]
    while time.monotonic() < deadline:
        try:
            chance.choice(calls)()
        except OSError as error:
            codes.add(error.errno or 0)
    return codes


@pytest.mark.parametrize("data", ["", "nopassthrough"])
@pytest.mark.parametrize("seconds", [1.5, pytest.param(60.0, marks=[pytest.mark.long, pytest.mark.timeout(300)])])
def test_a_lower_layer_that_changes_all_the_time_breaks_nothing(
    layers: Layers, outside: Path, data: str, seconds: float
) -> None:
    """No crash (`quiet`), no way out, and no error that a filesystem would not give."""
    layers.options = data
    for directory in ("a", "b", "a/c"):
        for layer in (layers.lower, layers.upper):
            (layer / directory).mkdir()
        for name in "xyz":
            (layers.lower / directory / name).write_text("lower")
    root = layers.mount()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            meddle(layers.lower, outside, 1, reading)
        finally:
            os._exit(0)
    try:
        codes = as_user(0, lambda: look_around(root, 2, seconds, changes=False))
        codes |= as_user(0, lambda: look_around(root, 3, seconds, changes=True))
    finally:
        os.write(writing, b"x")
        assert os.waitpid(pid, 0)[1] == 0
        os.close(reading)
        os.close(writing)
    assert not codes & NONSENSE, [errno.errorcode[code] for code in codes]
    assert untouched(outside)
    (root / "still").write_text("served")
    assert (layers.upper / "still").read_text() == "served"


IMITATIONS = {
    "opaque": b"y", "whiteout": b"", "redirect": b"/dir", "metacopy": b"", "origin": b"\xff" * 29,
    "overlay.opaque": b"y",
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["trusted.overlay.", "user.overlay."])
def test_marks_that_a_container_makes_itself_are_words_to_it_and_nothing_to_the_overlay(
    layers: Layers, prefix: str
) -> None:
    """Escaped in the upper (OVL_XATTR_ESCAPE_PREFIX), so that a container can build layers of its own."""
    if prefix.startswith("user"):
        layers.features = "userxattr"
    for name in ("dir", "dir/below", "empty"):
        (layers.lower / name).mkdir()
    (layers.lower / "file").touch()
    root = layers.mount()
    for place in (root / "dir", root / "file"):
        for name, value in IMITATIONS.items():
            os.setxattr(place, prefix + name, value)
        shown = {name: os.getxattr(place, name) for name in os.listxattr(place)}
        assert shown == {prefix + name: value for name, value in IMITATIONS.items()}
        stored = os.listxattr(layers.upper / place.name)
        assert {prefix + "overlay." + name for name in IMITATIONS} <= set(stored)
        assert not {prefix + name for name in ("opaque", "whiteout", "redirect", "metacopy")} & set(stored)
        for name in IMITATIONS:
            assert told(lambda place=place, name=name: os.getxattr(layers.upper / place.name, prefix + name)) in (
                0 if name in ("origin", "overlay.opaque") else errno.ENODATA,
            )
    for _ in range(2):
        assert sorted(os.listdir(root)) == ["dir", "empty", "file"]
        assert os.listdir(root / "dir") == ["below"]
        assert (root / "file").read_bytes() == b""
        layers.umount()
        layers.mount()
    os.removexattr(root / "dir", prefix + "opaque")
    assert prefix + "opaque" not in os.listxattr(root / "dir")
    if prefix.startswith("user"):  # the kernel takes no redirect_dir= beside it
        return
    with layers.kernel() as path:
        assert os.listdir(path / "dir") == ["below"]
        assert os.getxattr(path / "dir", prefix + "redirect") == b"/dir"


def told(call: Callable[[], object]) -> int:
    """The errno that the call raises, or 0."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0
