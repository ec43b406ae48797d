"""What cannot be mounted is refused in one line that names it, with its exit status, and leaves nothing behind."""

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overt.host import loop, mounts, process

from .scene import SOURCE, Scene, run_overt

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

Stage = Callable[..., Scene]


class Ground:
    """Directories for a mount, on an ext4 disk; what is there is compared before and after."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.overlay, self.options = scene.make()
        os.chmod(scene.base, 0o755)

    @property
    def lower(self) -> Path:
        return self.scene.lower

    def using(self, **replaced: object) -> str:
        """The options, some of them replaced; None takes one out."""
        options = {"lowerdir": self.lower, "upperdir": self.overlay.upper, "workdir": self.overlay.work, **replaced}
        return ",".join(f"{key}={value}" for key, value in options.items() if value is not None)

    def present(self) -> list[object]:
        return [
            Path("/proc/self/mountinfo").read_text(errors="replace"),
            os.listdir(self.overlay.work),
            os.listdir(self.overlay.upper),
            sorted(os.listdir("/run/overt")),
            [pid for pid in os.listdir("/proc") if pid.isdigit() and self.is_ours(pid)],
        ]

    def is_ours(self, pid: str) -> bool:
        try:
            return str(self.overlay.target) in Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            return False

    def refused(self, words: str, options: str, *, target: object = None, status: int = 1, **how: object) -> None:
        before = self.present()
        done = run_overt("mount", "-o", options, str(target or self.overlay.target), **how)
        assert re.fullmatch(f"overt[^\n]*{words}[^\n]*\n", done.stderr), done.stderr
        assert (done.returncode, done.stdout) == (status, "")
        assert self.present() == before


@pytest.fixture
def ground(ext4: Scene) -> Ground:
    return Ground(ext4)


@contextmanager
def mounted(kind: str, place: Path, source: str = "none") -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    fd = mounts.new_mount(kind, [("source", source)])
    mounts.attach(fd, str(place))
    os.close(fd)
    try:
        yield place
    finally:
        mounts.umount(str(place))


@pytest.mark.parametrize("which", ["lowerdir", "datadir+", "upperdir", "workdir"])
def test_a_missing_directory(ground: Ground, which: str) -> None:
    missing = ground.scene.root / "missing"
    what = {"datadir+": "data layer"}.get(which, which)
    ground.refused(f"{what} {missing}: No such file or directory", ground.using(**{which: missing}))


def test_a_missing_or_unfit_mount_point(ground: Ground) -> None:
    missing = ground.scene.base / "missing"
    ground.refused(f"{missing}: no such directory", ground.options, target=missing)
    file = ground.scene.base / "file"
    file.touch()
    ground.refused(f"{file}: not a directory", ground.options, target=file)
    ground.refused(f"lowerdir {file}: not a directory", ground.using(lowerdir=file))


def test_a_layer_given_by_a_descriptor_is_that_directory_whatever_is_at_its_place(ground: Ground) -> None:
    place, target = ground.scene.base / "place", ground.scene.base / "target"
    (place / "layer").mkdir(parents=True)
    (place / "layer" / "file").touch()
    target.mkdir()
    fd = os.open(place / "layer", os.O_PATH)
    try:
        with mounted("tmpfs", place):
            assert run_overt("mount", "-o", f"lowerdir=/proc/{os.getpid()}/fd/{fd}", str(target)).returncode == 0
            assert os.listdir(target) == ["file"]
            assert run_overt("umount", str(target)).returncode == 0
    finally:
        os.close(fd)


@pytest.mark.parametrize("kind", ["ramfs", "proc"])
def test_an_upper_on_a_filesystem_that_cannot_serve(ground: Ground, kind: str) -> None:
    with mounted(kind, ground.scene.base / kind) as place:
        upper, work = (place / "upper", place / "work") if kind == "ramfs" else (place / "sys", place / "bus")
        for path in (upper, work):
            path.mkdir(exist_ok=True)
        ground.refused(f"{kind if kind == 'ramfs' else ''}.*", ground.using(upperdir=upper, workdir=work))
        assert kind == "proc" or os.listdir(work) == []


def test_an_upper_on_vfat(ground: Ground) -> None:
    maker = shutil.which("mkfs.vfat", path="/usr/sbin:/sbin:/usr/bin")
    if maker is None or "vfat" not in Path("/proc/filesystems").read_text():
        pytest.skip("no mkfs.vfat, or no vfat in the kernel")
    image = ground.scene.base / "image"
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    subprocess.run([maker, str(image)], check=True, capture_output=True)
    with open(image, "r+b") as file:
        device = loop.attach(file.fileno())
    try:
        with mounted("vfat", ground.scene.base / "vfat", device.path) as place:
            for name in ("upper", "work"):
                (place / name).mkdir()
            ground.refused("cannot serve as an upper", ground.using(upperdir=place / "upper", workdir=place / "work"))
    finally:
        os.close(device.fd)


def test_an_upper_on_another_overt_mount(ground: Ground) -> None:
    """A FUSE filesystem."""
    other = ground.scene.overlay()
    for name in ("upper", "work"):
        os.mkdir(other.target / name)
    options = ground.using(upperdir=other.target / "upper", workdir=other.target / "work")
    ground.refused("cannot serve as an upper", options)
    assert os.listdir(other.target / "work") == []


def test_a_read_only_upper(ground: Ground) -> None:
    fd = os.open(ground.scene.root, os.O_PATH)
    mounts.set_attributes(fd, add=mounts.MOUNT_ATTR_RDONLY)
    try:
        ground.refused("Read-only file system", ground.options)
    finally:
        mounts.set_attributes(fd, remove=mounts.MOUNT_ATTR_RDONLY)
        os.close(fd)


def test_layers_that_overlap(ground: Ground) -> None:
    upper, work = ground.overlay.upper, ground.overlay.work
    inside = upper / "inside"
    ground.refused("are the same directory", ground.using(upperdir=ground.lower))
    ground.refused("are the same directory", ground.using(workdir=upper))
    ground.refused(f"the layer {ground.lower} is named twice", ground.using(lowerdir=f"{ground.lower}:{ground.lower}"))
    for which in ("lowerdir", "workdir"):
        inside.mkdir()
        before = ground.using(**{which: inside})
        ground.refused(f"{which} {inside} is inside upperdir", before)
        inside.rmdir()
    (work / "inside").mkdir()
    ground.refused("is inside workdir", ground.using(upperdir=work / "inside"))


def test_an_upper_that_another_server_has_mounted(ground: Ground) -> None:
    other = ground.scene.overlay()
    ground.refused("in use by another overt mount", ground.using(upperdir=other.upper, workdir=other.work))
    ground.refused("in use by another overt mount", ground.using(upperdir=other.upper))
    ground.refused("in use by another overt mount", ground.using(workdir=other.work))


def test_an_upper_that_the_kernel_has_mounted(ground: Ground) -> None:
    other, _ = ground.scene.make()
    fd = mounts.new_mount("overlay", [
        ("lowerdir", str(ground.lower)), ("upperdir", str(other.upper)), ("workdir", str(other.work)),
    ])  # fmt: skip
    mounts.attach(fd, str(other.target))
    os.close(fd)
    try:
        ground.refused("in use by a kernel overlay", ground.using(upperdir=other.upper))
    finally:
        mounts.umount(str(other.target))


def test_a_workdir_on_another_filesystem(ground: Ground, tmp_path: Path) -> None:
    ground.refused("put both on one filesystem", ground.using(workdir=tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (",frobnicate", "unknown option 'frobnicate'"),
        (",fsync=never", "fsync=never: not one of"),
        (",unseen=perhaps", "unseen=perhaps"),
        (",volatile,fsync=strict", "contradict"),
        (",redirect_dir=perhaps", "redirect_dir=perhaps"),
    ],
)
def test_an_option_that_does_not_exist(ground: Ground, extra: str, words: str) -> None:
    ground.refused(words, ground.options + extra, status=2)


def test_options_that_belong_together(ground: Ground) -> None:
    ground.refused("lowerdir= is missing", ground.using(lowerdir=None), status=2)
    ground.refused("needs workdir=", ground.using(workdir=None), status=2)
    ground.refused("without upperdir=", ground.using(upperdir=None), status=2)
    ground.refused("there is no upperdir=", ground.using(upperdir=None, workdir=None) + ",volatile", status=2)


def without_dev_fuse() -> None:
    """Run in the child: a /dev that has nothing but what Python needs."""
    process.unshare(process.CLONE_NEWNS)
    mounts.make_private()
    fd = mounts.new_mount("tmpfs", [])
    for name, number in (("null", 3), ("urandom", 9)):
        os.mknod(name, stat.S_IFCHR | 0o666, os.makedev(1, number), dir_fd=fd)
    mounts.attach(fd, "/dev")
    os.close(fd)


@pytest.mark.parametrize("volatile", ["", ",volatile"])
def test_a_machine_without_dev_fuse(ground: Ground, volatile: str) -> None:
    ground.refused("/dev/fuse: No such file or directory", ground.options + volatile, preexec_fn=without_dev_fuse)


def test_a_user_who_may_not(ground: Ground) -> None:
    try:
        subprocess.run([sys.executable, "-c", ""], user=65534, check=True, timeout=60)
    except PermissionError:
        pytest.skip(f"only its owner may run {sys.executable}")
    for path in (ground.overlay.target, ground.overlay.upper, ground.overlay.work):
        os.chown(path, 65534, 65534)
    run = ground.scene.base / "run"
    run.mkdir()
    how = {"user": 65534, "group": 65534, "extra_groups": [], "env": {**os.environ, "XDG_RUNTIME_DIR": str(run)}}
    ground.refused("Permission denied", ground.options, **how)  # nowhere to put the server's socket
    os.chown(run, 65534, 65534)
    ground.refused("(not permitted|denied)", ground.options, **how)
    assert list(run.glob("overt/*")) == []


def test_a_server_that_is_not_there(ground: Ground) -> None:
    before = ground.present()
    done = run_overt("mount", "--server", "/nonexistent", "-o", ground.options, str(ground.overlay.target))
    assert (done.returncode, done.stdout) == (1, "")
    assert "No such file or directory" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert ground.present() == before


# mount(8)'s helper


def helper(*words: str) -> "subprocess.CompletedProcess[str]":
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from overt.cli.helper import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, str(SOURCE), *words],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def test_the_mount_helper_mounts(ground: Ground) -> None:
    target = str(ground.overlay.target)
    assert helper("overlay", target, "-n", "-o", f"rw,{ground.options}").returncode == 0
    assert os.path.ismount(target)
    (ground.overlay.target / "file").write_bytes(b"x")
    done = run_overt("umount", target)
    assert (done.returncode, done.stdout) == (0, "no error recorded\n")
    assert (ground.overlay.upper / "file").read_bytes() == b"x"


def test_the_mount_helper_fails_with_32(ground: Ground) -> None:
    before = ground.present()
    target = str(ground.overlay.target)
    for words in (
        ("overlay", target, "-o", ground.using(lowerdir="/nonexistent")),
        ("overlay", target, "-o", f"{ground.options},frobnicate"),
        ("overlay", "-o", ground.options),
        ("overlay", target, "-Z"),
    ):
        done = helper(*words)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (32, "", 1), done.stderr
    assert ground.present() == before


def test_the_mount_helper_can_be_sloppy_or_only_pretend(ground: Ground) -> None:
    before = ground.present()
    target = str(ground.overlay.target)
    assert helper("overlay", target, "-f", "-o", ground.options).returncode == 0
    assert ground.present() == before
    assert helper("overlay", target, "-s", "-o", f"{ground.options},frobnicate").returncode == 0
    assert run_overt("umount", target).returncode == 0
