"""Rule 9: what stands at the mount. An unseen error does not refuse it; an upper that was left dirty does."""

import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overt.host import mounts
from overt.server.client import ServerError
from overt.server.layers import volatile_mark

from .scene import EIO, Overlay, Scene, told, wait_until

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

Stage = Callable[..., Scene]


def unseen(scene: Scene) -> None:
    (scene.root / "host-file").write_bytes(scene.page)
    scene.fail()


def test_a_volatile_mount_goes_on_over_somebodys_unseen_error_and_says_so(scene: Scene) -> None:
    unseen(scene)
    overlay = scene.overlay(volatile=True)
    assert any("1 error(s) before this mount" in line and "Input/output" in line for line in scene.notices)
    (error,) = scene.server.upper_status()["errors"]
    assert (error["source"], error["errno"], error["taken"]) == ("standing", EIO, False)
    assert overlay.new_syncfs() == 0
    overlay.lose()
    assert [overlay.new_syncfs(), overlay.new_syncfs()] == [EIO, EIO]


@pytest.mark.parametrize("volatile", [False, True], ids=["ordinary", "volatile"])
def test_unseen_refuse_is_the_kernels_way(scene: Scene, volatile: bool) -> None:
    unseen(scene)
    overlay, options = scene.make(volatile=volatile)
    with pytest.raises(ServerError, match="nobody has been told of"):
        scene.server.client.mount(str(overlay.target), options + ",unseen=refuse")
    assert not os.path.ismount(overlay.target)
    assert os.listdir(overlay.work) == []
    assert [scene.host_syncfs(), scene.host_syncfs()] == [EIO, 0]
    scene.server.client.mount(str(overlay.target), options + ",unseen=refuse")
    scene.overlays.append(overlay)


def refuses_what_was_left_dirty(scene: Scene) -> None:
    overlay = scene.overlay(volatile=True)
    scene.close(overlay.write("file"))
    overlay.umount()
    for extra in ("", "volatile"):
        with pytest.raises(ServerError, match=r"work/incompat/volatile.*remove .*/work/incompat"):
            scene.again(overlay, extra)
    assert not os.path.ismount(overlay.target)
    os.rmdir(overlay.work / "work/incompat/volatile")
    os.rmdir(overlay.work / "work/incompat")
    scene.again(overlay)
    assert (overlay.target / "file").read_bytes() == scene.page


def test_an_upper_that_a_volatile_mount_left_is_refused_with_words(scene: Scene) -> None:
    refuses_what_was_left_dirty(scene)


def test_without_that_check_it_is_mounted(stage: Stage) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refuses_what_was_left_dirty(stage("ext4", off="work_check"))


def test_the_kernel_refuses_it_too(ext4: Scene) -> None:
    """The mark is the kernel's own (it explains itself in its log only)."""
    overlay = ext4.overlay(volatile=True)
    overlay.umount()
    assert told(ext4.kernel_overlay, overlay) == errno.EINVAL
    os.rmdir(overlay.work / "work/incompat/volatile")
    os.rmdir(overlay.work / "work/incompat")
    assert told(ext4.kernel_overlay, overlay) == 0


@contextmanager
def in_use_by_the_kernel(scene: Scene, upper: Path, work: Path) -> Iterator[None]:
    place = scene.base / "of-the-kernel"
    place.mkdir(exist_ok=True)
    directories = {"lowerdir": scene.lower, "upperdir": upper, "workdir": work}
    words = (f"{key}={path}".replace(",", r"\,") for key, path in directories.items())
    subprocess.run(["mount", "-i", "-t", "overlay", "-o", ",".join(words), "overlay", place], check=True, timeout=30)
    try:
        yield
    finally:
        mounts.umount(place)


@pytest.mark.parametrize("name", ["plain", "with space, comma and :colon"])
@pytest.mark.parametrize("shared", ["upper and work", "upper", "work"])
@pytest.mark.parametrize("by_link", [False, True])
def test_directories_that_the_kernel_uses_are_refused(ext4: Scene, name: str, shared: str, by_link: bool) -> None:
    overlay, _ = ext4.make()
    (others := ext4.root / name).mkdir()
    for kind in ("upper", "work"):
        (others / kind).mkdir()
    used = {kind: others / kind for kind in ("upper", "work")}
    mine = {kind: used[kind] if kind in shared else getattr(overlay, kind) for kind in used}
    if by_link:
        (ext4.base / "link").symlink_to(others)
        used = {kind: ext4.base / "link" / kind for kind in used}
    words = (f"{kind}dir={path}".replace(",", r"\,") for kind, path in mine.items())
    options = ",".join([f"lowerdir={ext4.lower}", *words])
    with in_use_by_the_kernel(ext4, *used.values()):
        time.sleep(1.1)  # the table was looked at for the mount before
        (others / "work/work").chmod(0o700)
        (others / "work/work/#of-the-kernel").touch()
        with pytest.raises(ServerError, match="is in use by a kernel overlay mount"):
            ext4.server.client.mount(str(overlay.target), options)
        assert (others / "work/work/#of-the-kernel").exists()
    ext4.server.client.mount(str(overlay.target), options)
    ext4.overlays.append(overlay)


def marks(overlay: Overlay) -> list[str]:
    return [str(path.relative_to(overlay.work)) for path in overlay.work.rglob("*") if path.parent != overlay.work]


def too_far(scene: Scene, steps: int = 24) -> Path:
    """A directory that is found by a short name, and whose real path is longer than the kernel takes."""
    short = scene.base / "short"
    where = os.open(scene.base, os.O_RDONLY)
    real = scene.base
    for step in range(steps):
        name = f"{step:02}" + "-" * 200
        os.mkdir(name, dir_fd=where)
        down = os.open(name, os.O_RDONLY, dir_fd=where)
        os.close(where)
        where, real = down, real / name
        if step == steps // 2:
            short.symlink_to(real)
    os.close(where)
    return short.joinpath(*real.parts[-steps // 2 + 1 :])


def test_a_volatile_mount_that_finds_no_place_leaves_no_mark(scene: Scene) -> None:
    overlay, options = scene.make(volatile=True)
    place = too_far(scene)
    assert place.is_dir()
    with pytest.raises(ServerError, match="File name too long"):
        scene.server.client.mount(str(place), options)
    assert marks(overlay) == []
    wait_until(lambda: not scene.server.client.status()["mounts"], "the mount is gone")
    scene.again(overlay, "volatile")
    assert marks(overlay) == ["work/incompat", "work/incompat/volatile"]


def test_a_volatile_mount_that_the_kernel_does_not_talk_to_leaves_no_mark(stage: Stage) -> None:
    scene = stage("ext4", off="talking")
    for _ in range(20):
        overlay, options = scene.make(volatile=True)
        try:
            scene.server.client.mount(str(overlay.target), options)
        except ServerError as refusal:
            assert "did not begin to talk" in str(refusal)
            break
        scene.overlays.append(overlay)  # it talked before we asked
    assert marks(overlay) == []


@pytest.mark.parametrize("there", [[], ["incompat"], ["incompat", "incompat/volatile"]], ids=len)
def test_what_was_there_of_a_mark_stays(tmp_path: Path, there: list[str]) -> None:
    for name in there:
        (tmp_path / name).mkdir()
    work = os.open(tmp_path, os.O_PATH)
    with pytest.raises(ZeroDivisionError), volatile_mark(work):
        assert (tmp_path / "incompat/volatile").is_dir()
        raise ZeroDivisionError
    os.close(work)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == there
