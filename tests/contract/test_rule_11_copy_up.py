"""Rule 11: copy-up is all or nothing, whatever fails and wherever."""

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import Servers
from .scene import EIO, PAGE, Overlay, Scene, open_scene, told

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

Stage = Callable[..., Scene]


def told_open(path: Path, flags: int) -> int:
    """What open says."""
    return told(lambda: os.close(os.open(path, flags)))


def work_is_clean(overlay: Overlay) -> bool:
    return os.listdir(overlay.work / "work") == []


def an_error_found_at_fsync(scene: Scene, size: int = PAGE) -> None:
    content = scene.page * (size // PAGE)
    (scene.lower / "file").write_bytes(content)
    overlay = scene.overlay()
    scene.disk.fail("data")
    code = told_open(overlay.target / "file", os.O_RDWR)
    scene.disk.heal()
    assert code == EIO
    assert (overlay.target / "file").read_bytes() == content
    assert not (overlay.upper / "file").exists()
    assert work_is_clean(overlay)
    fd = overlay.open("file", os.O_RDWR)
    os.pwrite(fd, b"x", size)
    assert (overlay.target / "file").read_bytes() == content + b"x"
    assert (scene.lower / "file").read_bytes() == content


@pytest.mark.parametrize("size", [PAGE, 9 << 20])
def test_an_error_found_at_fsync_leaves_the_lower_file(scene: Scene, size: int) -> None:
    """Of a large file the disk is given parts before the fsync, which has to tell of those too."""
    an_error_found_at_fsync(scene, size)


@pytest.mark.parametrize("off", ["copy_flush"])
def test_without_that_fsync_it_is_masked(stage: Stage, filesystem: str, off: str) -> None:
    with pytest.raises(AssertionError):
        an_error_found_at_fsync(stage(filesystem, off=off))


def a_full_upper(scene: Scene) -> None:
    size = 1 << 20
    content = os.urandom(size)
    (scene.lower / "file").write_bytes(content)
    overlay = scene.overlay()
    scene.close(overlay.write("old", data=b"x"))
    balloon = os.open(scene.root / "balloon", os.O_CREAT | os.O_WRONLY)
    try:
        while told(os.write, balloon, bytes(1 << 20)) == 0:
            pass
        while told(os.write, balloon, bytes(PAGE)) == 0:
            pass
        for flags in (os.O_RDWR, os.O_WRONLY | os.O_APPEND):
            assert told_open(overlay.target / "file", flags) == errno.ENOSPC
        assert told(os.truncate, overlay.target / "file", size // 2) == errno.ENOSPC
        assert (overlay.target / "file").read_bytes() == content
        assert not (overlay.upper / "file").exists()
        assert work_is_clean(overlay)
        os.ftruncate(balloon, 0)
        os.fsync(balloon)
    finally:
        os.close(balloon)
        os.unlink(scene.root / "balloon")
    os.truncate(overlay.target / "file", size // 2)
    assert (overlay.target / "file").read_bytes() == content[: size // 2]


def test_a_full_upper_leaves_the_lower_file(stage: Stage, filesystem: str) -> None:
    a_full_upper(stage(filesystem, size=(128 if filesystem == "btrfs" else 24) << 20))


def test_a_volatile_mount_does_not_flush_a_copy_but_answers_for_it(scene: Scene) -> None:
    """There is nothing to find at fsync; the error is told by every question afterwards."""
    (scene.lower / "file").write_bytes(scene.page)
    overlay = scene.overlay(volatile=True)
    overlay.open("file", os.O_RDWR)
    scene.fail()
    assert [overlay.new_syncfs(), overlay.new_fsync("file"), overlay.new_syncfs()] == [EIO, EIO, EIO]


# Every system call that a copy-up makes


class Faults:
    """Which system call of the server's copy-ups fails: see `faults` in switches.py."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set(0)

    def set(self, number: int, code: int = EIO) -> None:
        """Fail the call with this number, counted from now (0: none)."""
        self.path.write_text(json.dumps([number, code]))
        self.log = self.path.with_suffix(".log")
        self.log.write_text("")

    def happened(self) -> str:
        """The call that was failed, or the empty string."""
        return self.log.read_text()


@pytest.fixture(scope="module")
def faulty(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scene, Faults]]:
    path = tmp_path_factory.mktemp("faults") / "fault"
    faults = Faults(path)
    with open_scene("ext4", servers.get(f"faults:{path}")) as scene:
        yield scene, faults


def read_file(path: Path) -> object:
    st = os.lstat(path)
    kind = stat.S_IFMT(st.st_mode)
    if kind == stat.S_IFREG:
        return st.st_mode, st.st_uid, path.read_bytes(), os.getxattr(path, "user.note")
    if kind == stat.S_IFLNK:
        return st.st_mode, st.st_uid, os.readlink(path)
    if kind == stat.S_IFDIR:
        return st.st_mode, st.st_uid, sorted(os.listdir(path)), os.getxattr(path, "user.note")
    return st.st_mode, st.st_uid, st.st_rdev


def make_file(path: Path) -> None:
    path.write_bytes(b"lower" * 1000)
    os.truncate(path, 100_000)
    os.setxattr(path, "user.note", b"note")


def make_directory(path: Path) -> None:
    path.mkdir()
    (path / "entry").write_bytes(b"entry")
    os.setxattr(path, "user.note", b"note")


def make_link(path: Path) -> None:
    path.symlink_to("somewhere")


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def open_for_writing(path: Path) -> None:
    os.close(os.open(path, os.O_RDWR))


def change_mode(path: Path) -> None:
    os.chmod(path, 0o600)


def change_owner(path: Path) -> None:
    os.lchown(path, 1, 1)


def link(path: Path) -> None:
    os.link(path, path.parent / f"{path.name}-link", follow_symlinks=False)


def rename(path: Path) -> None:
    os.rename(path, path.parent / f"{path.name}-moved")


def set_xattr(path: Path) -> None:
    os.setxattr(path, "user.more", b"more")


CASES = [
    (make_file, open_for_writing),
    (make_file, change_mode),
    (make_file, link),
    (make_file, rename),
    (make_file, set_xattr),
    (make_directory, change_mode),
    (make_link, change_owner),
    (make_fifo, change_mode),
]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize(
    ("make", "change"), CASES, ids=[f"{make.__name__}-{change.__name__}" for make, change in CASES]
)
def test_whichever_system_call_of_a_copy_up_fails_it_is_as_if_nothing_happened(
    faulty: tuple[Scene, Faults], make: Callable[[Path], None], change: Callable[[Path], None], code: int
) -> None:
    """Call by call, until none is left to fail. What it makes of that is its own: pass it on, or find another way."""
    scene, faults = faulty
    failed = []
    for number in range(1, 100):
        name = f"{make.__name__}-{change.__name__}-{code}-{number}"
        (scene.lower / "directory").mkdir(exist_ok=True)
        make(scene.lower / "directory" / name)
        before = read_file(scene.lower / "directory" / name)
        overlay = scene.overlay()
        place, upper = overlay.target / "directory" / name, overlay.upper / "directory" / name
        assert read_file(place) == before
        faults.set(number, code)
        result = told(change, place)
        call = faults.happened()
        faults.set(0)
        assert read_file(scene.lower / "directory" / name) == before, call
        if result:
            assert result == code, call
            assert read_file(place) == before, call
            assert not os.path.lexists(upper), call
            assert told(change, place) == 0, call
        assert work_is_clean(overlay), call
        overlay.umount()
        if not call:
            break
        failed.append(call)
    assert len(failed) > 5, failed
    assert len(failed) < 99


def cut(path: Path) -> None:
    os.truncate(path, 50)


def overwrite(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("change", [change_mode, open_for_writing, cut, overwrite])
def test_whichever_system_call_fails_while_data_and_attributes_are_apart_nothing_is_lost(
    faulty: tuple[Scene, Faults], change: Callable[[Path], None], code: int
) -> None:
    """metacopy=on: the attributes are copied up, and then the data, into a file that has its name already."""
    scene, faults = faulty
    failed = []
    for number in range(1, 100):
        name = f"apart-{change.__name__}-{code}-{number}"
        make_file(scene.lower / name)
        overlay = scene.overlay("metacopy=on")
        place = overlay.target / name
        if change is not change_mode:
            os.chmod(place, 0o640)
        before = read_file(place)
        faults.set(number, code)
        result = told(change, place)
        call = faults.happened()
        faults.set(0)
        assert read_file(scene.lower / name)[2:] == before[2:], call  # type: ignore[index]
        if result:
            assert result == code, call
            assert read_file(place) == before, call
            overlay.umount()
            scene.again(overlay, "metacopy=on")
            assert read_file(place) == before, call
            assert told(change, place) == 0, call
        assert work_is_clean(overlay), call
        overlay.umount()
        if not call:
            break
        failed.append(call)
    assert len(failed) > 5, failed
    assert len(failed) < 99


def unlink(path: Path) -> None:
    os.unlink(path)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("make", [make_file, make_link])
@pytest.mark.parametrize("change", [change_owner, unlink, rename, link])
def test_whichever_system_call_fails_a_hard_link_stays_one_file(
    faulty: tuple[Scene, Faults], make: Callable[[Path], None], change: Callable[[Path], None], code: int
) -> None:
    """index=on: what fails may leave a copy, which all names show, and which has the content that there was."""
    scene, faults = faulty
    failed = []
    for number in range(1, 100):
        name = f"hard-{make.__name__}-{change.__name__}-{code}-{number}"
        make(scene.lower / name)
        os.link(scene.lower / name, scene.lower / f"{name}-other", follow_symlinks=False)
        overlay = scene.overlay("index=on")
        place, other = overlay.target / name, overlay.target / f"{name}-other"
        before = read_file(place)
        ino = os.lstat(other).st_ino
        faults.set(number, code)
        result = told(change, place)
        call = faults.happened()
        faults.set(0)
        if result:
            assert result == code, call
            for again in (False, True):
                if again:
                    overlay.umount()
                    scene.again(overlay, "index=on")
                assert read_file(place) == read_file(other) == before, call
                assert {os.lstat(path).st_ino for path in (place, other)} == {ino}, call
                assert {os.lstat(path).st_nlink for path in (place, other)} == {2}, call
            assert told(change, place) == 0, call
        expected = {change_owner: 2, unlink: 1, rename: 2, link: 3}[change]
        for again in (False, True):
            if again:
                overlay.umount()
                scene.again(overlay, "index=on")
            st = os.lstat(other)
            assert (st.st_ino, st.st_nlink, st.st_uid) == (ino, expected, int(change is change_owner)), call
            if change is change_owner:
                assert os.lstat(place).st_uid == 1, call
        assert work_is_clean(overlay), call
        overlay.umount()
        if not call:
            break
        failed.append(call)
    assert len(failed) > 5, failed
    assert len(failed) < 99
