"""Files whose attributes alone are copied up (metacopy=on), and layers that hold nothing but data or attributes."""

import errno
import mmap
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from overt.host.files import RENAME_EXCHANGE, renameat2

from .ground import Layers, describe, is_whiteout, link_open, marks, xattrs

METACOPY, REDIRECT = "trusted.overlay.metacopy", "trusted.overlay.redirect"
CONTENT = b"lower content\n" * 1000
LONG_AGO = 1_100_000_000_123_456_789


def unmount(layers: Layers) -> None:
    """Unmount, and forget that the mount was volatile."""
    layers.umount()
    shutil.rmtree(layers.work / "work" / "incompat", ignore_errors=True)


def attributes_only(path: Path) -> bool:
    return METACOPY in marks(path)


def as_in_the_kernel(layers: Layers) -> None:
    """What overt shows, the kernel shows too, and overt again after a new mount."""
    expected = describe(layers.path)
    with layers.kernel() as path:
        assert describe(path) == expected
    assert describe(layers.mount()) == expected


@pytest.fixture(params=["", "nopassthrough", "volatile"], ids=["passthrough", "nopassthrough", "volatile"])
def copying(request: pytest.FixtureRequest, new_layers: Callable[..., Layers]) -> Layers:
    """A file in each of two lower layers; mounted."""
    layers = new_layers(lowers=2, options=request.param, features="metacopy=on")
    for number, layer in enumerate(layers.lowers):
        (layer / "dir").mkdir()
        (layer / "dir" / f"file{number}").write_bytes(CONTENT)
        (layer / "dir" / "same").write_bytes(b"%d" % number * 1000)
        os.utime(layer / "dir" / f"file{number}", ns=(LONG_AGO, LONG_AGO))
    layers.mount()
    return layers


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.chmod(path, 0o600), lambda path: os.chown(path, 5, 6),
        lambda path: os.setxattr(path, "user.note", b"note"), lambda path: os.utime(path, (1, 2)),
        lambda path: os.rename(path, path.parent.parent / "moved"),
        lambda path: os.rename(path, path.parent / "moved"),
        lambda path: os.link(path, path.parent.parent / "linked"),
    ],
    ids=["chmod", "chown", "setxattr", "utime", "rename", "rename within", "link"],
)  # fmt: skip
def test_what_changes_no_data_copies_none(copying: Layers, change: Callable[[Path], object]) -> None:
    root = copying.path
    number = os.stat(root / "dir" / "file1").st_ino
    change(root / "dir" / "file1")
    (changed,) = [path for path in root.rglob("*") if path.stat().st_ino == number][:1]
    upper = copying.upper / changed.relative_to(root)
    assert attributes_only(upper)
    assert os.stat(upper).st_blocks * 512 < len(CONTENT) == os.stat(upper).st_size
    assert changed.read_bytes() == CONTENT
    assert os.stat(changed).st_blocks * 512 >= len(CONTENT)
    assert os.getxattr(upper, METACOPY) == b""
    as_in_the_kernel(copying)
    assert os.stat(changed).st_ino == number


def write(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"upper")


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"upper")


def overwrite(path: Path) -> None:
    path.write_bytes(b"upper")


def touch_nothing(path: Path) -> None:
    os.close(os.open(path, os.O_RDWR))


def mapped(path: Path) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[:5] = b"upper"


@pytest.mark.parametrize(
    "change",
    [
        write, append, overwrite, mapped, touch_nothing, lambda path: os.truncate(path, 5),
        lambda path: os.truncate(path, 0), lambda path: os.truncate(path, 100_000),
    ],
    ids=["write", "append", "overwrite", "mapped", "touch nothing", "shorter", "to nothing", "longer"],
)  # fmt: skip
def test_the_first_write_brings_the_data(copying: Layers, change: Callable[[Path], object]) -> None:
    root = copying.path
    path, other = root / "dir" / "file1", copying.place / "other"
    other.write_bytes(CONTENT)
    os.chmod(path, 0o4750)
    os.setxattr(path, "security.capability", b"\1\0\0\2" + bytes(16))
    keep = xattrs(path)
    change(other)
    assert attributes_only(copying.upper / "dir" / "file1")
    change(path)
    assert not attributes_only(copying.upper / "dir" / "file1")
    assert path.read_bytes() == other.read_bytes()
    assert (copying.lowers[1] / "dir" / "file1").read_bytes() == CONTENT
    if change is touch_nothing:
        assert os.stat(path).st_mtime_ns == LONG_AGO
        assert xattrs(path) == keep
        assert os.stat(path).st_mode & 0o7777 == 0o4750
    as_in_the_kernel(copying)


def test_open_files_see_the_data_when_it_has_come(copying: Layers) -> None:
    root = copying.path
    path = root / "dir" / "file1"
    early = os.open(path, os.O_RDONLY)
    os.chmod(path, 0o600)
    late = os.open(path, os.O_RDONLY)
    try:
        assert os.pread(early, 5, 0) == os.pread(late, 5, 0) == CONTENT[:5]
        os.fsync(late)
        os.fdatasync(late)
        write(path)
        again = os.open(path, os.O_RDONLY)
        try:
            assert os.pread(again, 5, 0) == b"upper"
        finally:
            os.close(again)
        if "nopassthrough" in copying.options:
            assert os.pread(early, 5, 0) == os.pread(late, 5, 0) == b"upper"
        for fd in (early, late):
            os.fsync(fd)
            assert os.fstat(fd).st_ino == os.stat(path).st_ino
    finally:
        os.close(early)
        os.close(late)
    as_in_the_kernel(copying)


def test_a_file_without_a_name_gets_its_data_too(copying: Layers) -> None:
    root = copying.path
    path = root / "dir" / "file1"
    os.chmod(path, 0o600)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.unlink(path)
        assert os.pread(fd, 5, 0) == CONTENT[:5]
        os.fchmod(fd, 0o640)
        if not copying.options:
            return  # a lower file that is open stays what it is, see docs/limits.md
        writing = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        try:
            os.write(writing, b"upper")
            assert os.pread(fd, 20, 0) == b"upper" + CONTENT[5:20]
        finally:
            os.close(writing)
    except OSError as error:
        assert error.errno == errno.ESTALE and "nopassthrough" not in copying.options
    finally:
        os.close(fd)
    assert is_whiteout(copying.upper / "dir" / "file1")


def test_redirects_lead_to_the_data(copying: Layers) -> None:
    root = copying.path
    (root / "new").mkdir()
    os.rename(root / "dir" / "file1", root / "dir" / "one")
    assert os.getxattr(copying.upper / "dir" / "one", REDIRECT) == b"file1"
    os.rename(root / "dir" / "one", root / "new" / "two")
    assert os.getxattr(copying.upper / "new" / "two", REDIRECT) == b"/dir/file1"
    os.link(root / "dir" / "file0", root / "new" / "linked")
    assert os.getxattr(copying.upper / "dir" / "file0", REDIRECT) == b"/dir/file0"
    os.rename(root / "dir", root / "new" / "dir")
    renameat2(
        -100, os.fsencode(root / "new" / "dir" / "same"), -100, os.fsencode(root / "new" / "two"), RENAME_EXCHANGE
    )
    assert (root / "new" / "dir" / "same").read_bytes() == CONTENT
    assert (root / "new" / "two").read_bytes() == b"0" * 1000
    as_in_the_kernel(copying)
    append(root / "new" / "linked")
    append(root / "new" / "two")
    assert (root / "new" / "dir" / "file0").read_bytes() == CONTENT + b"upper"
    as_in_the_kernel(copying)


def test_through_layers_that_have_attributes_only(copying: Layers) -> None:
    root = copying.path
    os.rename(root / "dir" / "file1", root / "first")
    os.chmod(root / "dir" / "file0", 0o600)
    unmount(copying)
    copying.stack()
    with copying.kernel() as path:
        os.rename(path / "first", path / "second")
        os.chown(path / "dir" / "file0", 7, 7)
        assert (path / "second").read_bytes() == CONTENT
    copying.stack()
    copying.mount()
    os.chmod(root / "second", 0o640)
    os.rename(root / "dir", root / "moved")
    assert (root / "second").read_bytes() == (root / "moved" / "file0").read_bytes() == CONTENT
    as_in_the_kernel(copying)
    append(root / "second")
    append(root / "moved" / "file0")
    assert (root / "second").read_bytes() == (root / "moved" / "file0").read_bytes() == CONTENT + b"upper"
    as_in_the_kernel(copying)


def test_small_and_empty_files(copying: Layers) -> None:
    """They fill a block, or none, with data or without."""
    for name, content in (("small", b"x"), ("empty", b"")):
        (copying.lowers[1] / name).write_bytes(content)
    unmount(copying)
    root = copying.mount()
    for name, content in (("small", b"x"), ("empty", b"")):
        os.setxattr(root / name, "user.note", b"n" * 200)
        assert attributes_only(copying.upper / name)
        assert (root / name).read_bytes() == content
    as_in_the_kernel(copying)
    assert (root / "small").read_bytes() == b"x"


def test_data_that_is_not_there_is_an_error_and_no_zeros(copying: Layers) -> None:
    root = copying.path
    os.chmod(root / "dir" / "file1", 0o600)
    unmount(copying)
    os.unlink(copying.lowers[1] / "dir" / "file1")
    root = copying.mount()
    for attempt in (Path.read_bytes, append):
        with pytest.raises(OSError) as raised:
            attempt(root / "dir" / "file1")
        assert raised.value.errno == errno.EIO
    with copying.kernel() as path, pytest.raises(OSError) as raised:
        (path / "dir" / "file1").read_bytes()
    assert raised.value.errno == errno.EIO


# Data-only layers


@pytest.fixture
def composed(new_layers: Callable[..., Layers]) -> Layers:
    """As composefs makes them: a layer of attributes, with redirects to objects in data-only layers; not mounted."""
    layers = new_layers(lowers=3)
    top, first, second = layers.lowers
    for layer, name, content in ((first, "ab", CONTENT), (second, "cd", b"other"), (second, "ab", b"hidden")):
        (layer / "objects").mkdir(exist_ok=True)
        (layer / "objects" / name).write_bytes(content)
    (top / "dir").mkdir()
    for name, size, value in (
        ("dir/file", len(CONTENT), b"/objects/ab"), ("other", 5, b"/objects/cd"), ("missing", 9, b"/objects/ef"),
        ("folder", 9, b"/objects"), ("out", 9, b"/objects/../../secret"), ("link", 9, b"/sym"),
    ):  # fmt: skip
        path = top / name
        path.touch(0o640)
        os.truncate(path, size)
        os.setxattr(path, METACOPY, b"")
        os.setxattr(path, REDIRECT, value)
    (first / "sym").symlink_to("objects/ab")
    (layers.place / "secret").write_text("not for this overlay")
    return layers


class DataOnly(Layers):
    """The same layers, of which all but the topmost lower one are data-only."""

    @property
    def words(self) -> str:
        lower = "::".join(map(str, self.lowers))
        return f"lowerdir={lower},upperdir={self.upper},workdir={self.work}"


def shown(root: Path) -> dict[str, object]:
    result: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        st = os.lstat(path)
        try:
            content: object = path.read_bytes() if path.is_file() else sorted(os.listdir(path))
        except OSError as error:
            content = errno.errorcode[error.errno or 0]
        result[str(path.relative_to(root))] = oct(st.st_mode), st.st_uid, st.st_size, content
    return result


@pytest.mark.parametrize("features", ["", "metacopy=on", "redirect_dir=nofollow", "redirect_dir=on"])
def test_data_only_layers(composed: Layers, features: str) -> None:
    composed.__class__ = DataOnly
    composed.features = features
    root = composed.mount()
    before = shown(root)
    assert before["dir/file"] == ("0o100640", 0, len(CONTENT), CONTENT)
    assert before["other"] == ("0o100640", 0, 5, b"other")
    assert "objects" not in before
    with composed.kernel() as path:
        assert shown(path) == before
    composed.mount()
    os.chmod(root / "dir" / "file", 0o600)
    append(root / "other")
    assert attributes_only(composed.upper / "dir" / "file") == (features == "metacopy=on")
    after = shown(root)
    assert after["dir/file"] == ("0o100600", 0, len(CONTENT), CONTENT)
    assert after["other"] == ("0o100640", 0, 10, b"otherupper")
    with composed.kernel() as path:
        assert shown(path) == after
    composed.mount()
    append(root / "dir" / "file")
    assert (root / "dir" / "file").read_bytes() == CONTENT + b"upper"
    after = shown(root)
    with composed.kernel() as path:
        assert shown(path) == after


def test_a_copy_with_data_elsewhere_can_be_opened_without_a_name(composed: Layers) -> None:
    composed.__class__ = DataOnly
    composed.features = "metacopy=on"
    root = composed.mount()
    fd = os.open(root / "dir" / "file", os.O_RDONLY)
    try:
        link_open(fd, root / "linked")
        os.link(root / "linked", root / "dir" / "again")
        os.unlink(root / "dir" / "file")
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        assert os.pread(again, 5, 0) == CONTENT[:5]
        os.close(again)
    finally:
        os.close(fd)
    assert (root / "linked").read_bytes() == CONTENT
    composed.umount()
    composed.mount()
    with open(root / "linked", "rb") as one, open(root / "dir" / "again", "rb") as other:
        assert one.read() == other.read() == CONTENT
        assert os.stat(one.fileno()) == os.stat(other.fileno())
        append(root / "dir" / "again")
        with open(root / "linked", "rb") as third:
            assert third.read() == CONTENT + b"upper"
    expected = shown(root)
    with composed.kernel() as path:
        assert shown(path) == expected


# While the data comes

CAPABILITY = "security.capability"
NET_ADMIN = bytes.fromhex("0100000200100000000000000000000000000000")
NET_RAW = bytes.fromhex("0100000200200000000000000000000000000000")


@pytest.mark.parametrize("had_capability", [False, True])
@pytest.mark.parametrize("name", ["mode", "owner", "times", "set", "removed", "left"])
def test_attributes_change_while_the_data_comes_and_stay(
    new_layers: Callable[..., Layers], had_capability: bool, name: str
) -> None:
    """Nobody who changes attributes waits for the data, and what they are then, they are when it has come."""
    assert any(changed_in_time(new_layers, had_capability, name) for _ in range(5)), "it waited for the data"


def changed_in_time(new_layers: Callable[..., Layers], had_capability: bool, name: str) -> bool:
    """Whether the change was made before the data had come. On a busy machine that can fail."""
    layers = new_layers(features="metacopy=on", options="nopassthrough")
    (layers.lower / name).write_bytes(os.urandom(1 << 20) * 60)
    if had_capability:
        os.setxattr(layers.lower / name, CAPABILITY, NET_ADMIN)
    os.utime(layers.lower / name, ns=(LONG_AGO, LONG_AGO))
    path = layers.mount() / name
    os.chmod(path, 0o640)
    assert attributes_only(layers.upper / name)
    assert not had_capability or os.getxattr(layers.upper / name, CAPABILITY) == NET_ADMIN
    came = threading.Event()

    def fetch() -> None:
        os.close(os.open(path, os.O_WRONLY))
        came.set()

    fetching = threading.Thread(target=fetch)
    fetching.start()
    while os.stat(layers.upper / name).st_blocks < 100:
        if came.is_set():
            break
    expected, times = (NET_ADMIN,) if had_capability else (), (LONG_AGO, LONG_AGO)
    if name == "mode":
        os.chmod(path, 0o604)
    elif name == "owner":
        os.chown(path, 5, 6)
        expected = ()
    elif name == "times":
        times = (LONG_AGO + 7, LONG_AGO + 8)
        os.utime(path, ns=times)
    elif name == "set":
        os.setxattr(path, CAPABILITY, NET_RAW)
        expected = (NET_RAW,)
    elif name == "removed" and had_capability:
        os.removexattr(path, CAPABILITY)
        expected = ()
    in_time = not came.is_set()
    fetching.join(60)
    assert came.is_set()
    for at in (layers.upper / name, path):
        st = os.stat(at)
        assert (st.st_atime_ns, st.st_mtime_ns) == times
        shown = [os.getxattr(at, key) for key in os.listxattr(at) if key == CAPABILITY]
        assert (name, at, tuple(shown)) == (name, at, expected)
        assert oct(st.st_mode) == ("0o100604" if name == "mode" else "0o100640")
        assert st.st_uid == (5 if name == "owner" else 0)
    assert not attributes_only(layers.upper / name)
    assert path.read_bytes() == (layers.lower / name).read_bytes()
    return in_time
