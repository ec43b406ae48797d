"""mount(8), umount(8), fstab(5) and systemd's reading of it, with overt's helpers where they look for them.

umount -c, as systemd calls it: without it, umount(8) asks statfs(2) for the type, and finds no helper for *fuse*.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from overt.host import mounts
from overt.lab import Disk
from overt.server import registry
from overt.server.client import Client, start

from .conftest import SOURCE, Place

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

_PROGRAM = """\
#!{python}
import sys
sys.path.insert(0, "{source}")
from overt.cli.{module} import main
main()
"""
_GENERATOR = Path("/usr/lib/systemd/system-generators/systemd-fstab-generator")


@pytest.fixture(autouse=True)
def helpers() -> Iterator[None]:
    """The helpers in /sbin, as this test sees it."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    sbin = os.path.realpath("/sbin")
    with tempfile.TemporaryDirectory(prefix="overt-sbin-") as directory:
        memory = mounts.new_mount("tmpfs", [])
        mounts.attach(memory, directory)
        os.close(memory)
        upper, work = Path(directory, "upper"), Path(directory, "work")
        upper.mkdir(mode=0o755)
        work.mkdir()
        for verb, module in (("mount", "helper"), ("umount", "umount_helper")):
            for kind in ("fuse", "fuseblk"):
                program = upper / f"{verb}.{kind}.overt"
                program.write_text(_PROGRAM.format(python=sys.executable, source=SOURCE, module=module))
                program.chmod(0o755)
        fd = mounts.new_mount("overlay", [("lowerdir", sbin), ("upperdir", str(upper)), ("workdir", str(work))])
        mounts.attach(fd, sbin)
        os.close(fd)
        try:
            yield
        finally:
            mounts.umount(sbin, mounts.MNT_DETACH)
            mounts.umount(directory, mounts.MNT_DETACH)


def run(*words: object, status: int = 0) -> str:
    """Run a command; what it said, on both outputs."""
    done = subprocess.run(
        list(map(str, words)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout
    return done.stdout


def writable(path: Path) -> bool:
    try:
        (path / "probe").touch()
    except OSError:
        return False
    return True


def test_mount_and_umount(place: Place) -> None:
    options = f"{place.options},x-systemd.automount,X-mount.mkdir,nofail,_netdev,user"
    run("mount", "-t", "fuse.overt", "-o", options, "overlay", place.merged)
    assert run("findmnt", "-no", "FSTYPE", place.merged).strip().endswith(".overt")
    assert writable(place.merged)
    assert run("umount", "-c", place.merged) == ""
    assert not os.path.ismount(place.merged)


def test_lazily_and_by_force(place: Place) -> None:
    for flag in ("-l", "-f"):
        run("mount", "-t", "fuse.overt", "-o", place.options, "overlay", place.merged)
        assert run("umount", flag, place.merged) == ""
        assert not os.path.ismount(place.merged)


def test_busy(place: Place) -> None:
    run("mount", "-t", "fuse.overt", "-o", place.options, "overlay", place.merged)
    with open(place.merged / "of0"):
        said = run("umount", "-c", place.merged, status=32)
    assert "busy" in said
    assert len(said.splitlines()) == 1
    assert os.path.ismount(place.merged)


def test_a_bad_option_is_a_line_and_32(place: Place) -> None:
    said = run("mount", "-t", "fuse.overt", "-o", f"{place.options},shiny", "overlay", place.merged, status=32)
    assert said == "mount.fuse.overt: unknown option 'shiny' (overt mount --help lists them)\n"


@pytest.fixture
def table(place: Place) -> Path:
    """An fstab with a line for names that need care."""
    for name in ("with space", "with,comma", "with:colon"):
        (place.base / name).mkdir()
        (place.base / name / f"file {name}").touch()
    for path in (place.upper, place.work):
        (path / r"with space, comma and :colon").mkdir()
    space, colon, comma = (f"{place.base}/{name}" for name in (r"with\040space", r"with\134:colon", r"with\134,comma"))
    all_of_them = r"with\040space\134,\040comma\040and\040\134:colon"
    file = place.base / "fstab"
    file.write_text(
        f"overt {place.merged} fuse.overt lowerdir={space}:{colon}:{comma},upperdir={place.upper}/{all_of_them},"
        f"workdir={place.work}/{all_of_them},noauto,x-systemd.requires-mounts-for=/usr 0 0\n"
    )
    return file


def test_a_line_of_fstab_with_names_that_need_care(place: Place, table: Path) -> None:
    run("mount", "-T", table, place.merged)
    assert sorted(os.listdir(place.merged)) == ["file with space", "file with,comma", "file with:colon"]
    (place.merged / "new").touch()
    assert [path.name for path in place.upper.glob("*/*")] == ["new"]
    run("umount", "-c", place.merged)


@pytest.mark.parametrize("by_fstab", [True, False])
def test_remount(place: Place, table: Path, by_fstab: bool) -> None:
    """The place becomes read-only, and not the superblock, which would not be told of an error any more."""
    run("mount", "-T", table, place.merged)
    words = ["-T", str(table)] if by_fstab else []
    assert run("mount", *words, "-o", "remount,ro", place.merged) == ""
    assert not writable(place.merged)
    flags = next(line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {place.merged} " in line)
    assert flags.rpartition(" ")[2].startswith("rw")
    run("mount", *words, "-o", "remount,rw,noexec", place.merged)
    assert writable(place.merged)
    assert "noexec" in run("findmnt", "-no", "OPTIONS", place.merged)
    if not by_fstab:
        said = run("mount", "-o", "remount,index=on", place.merged)
        assert said.endswith(f" {place.merged}: a remount does not change index=on: unmount, and mount anew\n")


def test_no_link_is_followed(place: Place) -> None:
    (place.lower / "link").symlink_to("of0")
    run("mount", "-t", "fuse.overt", "-o", f"{place.options},nosymfollow,noexec,nosuid", "overlay", place.merged)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        (place.merged / "link").read_text()
    run("mount", "-o", "remount,symfollow,exec", place.merged)
    assert (place.merged / "link").read_text() == "lower\n"
    assert writable(place.merged)
    options = run("findmnt", "-no", "OPTIONS", place.merged).split(",")
    assert {"nosuid", "noexec", "nosymfollow"} & set(options) == {"nosuid"}


def test_what_has_no_upper_stays_read_only(place: Place) -> None:
    run("mount", "-t", "fuse.overt", "-o", f"ro,lowerdir={place.lower}", "overlay", place.merged)
    assert "stays read-only" in run("mount", "-o", "remount,rw", place.merged, status=32)


def test_umount_says_what_was_lost() -> None:
    with Disk("ext4") as disk:
        base = Path(disk.path)
        for name in ("lower", "upper", "work", "merged"):
            (base / name).mkdir()
        options = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
        run("mount", "-t", "fuse.overt", "-o", options, "overlay", base / "merged")
        (base / "merged/file").write_bytes(disk.marker * 4096)
        disk.fail("data")
        said = run("umount", "-c", base / "merged", status=32)
        assert "unmounted; " in said
        assert "lost" in said
        assert len(said.splitlines()) == 1
        assert not os.path.ismount(base / "merged")
        disk.heal()


def test_systemd_reads_the_same_table(place: Place, table: Path) -> None:
    if not _GENERATOR.exists() or shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd here")
    units = place.base / "units"
    units.mkdir()
    subprocess.run([_GENERATOR, units, units, units], env={"SYSTEMD_FSTAB": str(table)}, check=True, timeout=30)
    (unit,) = units.glob("*.mount")
    settings = dict(line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line)
    assert settings["Type"] == "fuse.overt"
    assert settings["RequiresMountsFor"] == "/usr"
    # systemd hands the options to mount(8) as they are there.
    run("mount", settings["What"], settings["Where"], "-t", settings["Type"], "-o", settings["Options"])
    assert "file with space" in os.listdir(place.merged)


@pytest.mark.parametrize("extra", ["", ",volatile"])
@pytest.mark.parametrize("registered", [True, False])
def test_umount_says_that_the_server_was_dead(place: Place, extra: str, registered: bool) -> None:
    run("mount", "-t", "fuse.overt", "-o", place.options + extra, "overlay", place.merged)
    entry = registry.owner(str(place.merged))
    assert entry is not None
    os.kill(entry.pid, signal.SIGKILL)
    while not entry.dead:
        time.sleep(0.01)
    if not registered:
        registry.remove(entry.file)
    assert run("umount", "-c", place.merged, status=32) == (
        f"umount.fuse.overt: {place.merged}: unmounted; its server was dead: what it had not flushed may be lost\n"
    )
    assert not os.path.ismount(place.merged)
    assert registry.owner(str(place.merged)) is None


def test_what_lives_on_elsewhere_has_lost_nothing(place: Place) -> None:
    run("mount", "-t", "fuse.overt", "-o", place.options, "overlay", place.merged)
    copy = place.base / "copy"
    copy.mkdir()
    run("mount", "--bind", place.merged, copy)
    said = run("umount", "-c", place.merged)
    assert said == f"umount.fuse.overt: {place.merged}: unmounted; still mounted elsewhere\n"
    assert writable(copy)
    run("umount", copy)


def test_what_is_mounted_already_is_not_mounted_again(place: Place) -> None:
    """libmount looks for the line's source in the mount table, where a loop device would be no match."""
    names = {"overt": "with-upper", r"two\040words": "read-only", "none": "nameless"}
    for name in names.values():
        (place.base / name).mkdir()
    file = place.base / "fstab"
    file.write_text(
        "".join(
            f"{source} {place.base}/{name} fuse.overt "
            f"{place.options if name == 'with-upper' else f'lowerdir={place.lower}'} 0 0\n"
            for source, name in names.items()
        )
    )
    for _ in range(2):
        run("mount", "-a", "-T", file)
    for source, name in names.items():
        sources = run("findmnt", "-rno", "SOURCE", place.base / name).splitlines()
        assert sources == [source.replace(r"\040", r"\x20")]
        run("umount", "-c", place.base / name)


def test_a_source_that_is_a_path_is_not_shown(place: Place) -> None:
    for source in ("/no/such", "..", "x" * 256):
        run("mount", "-t", "fuse.overt", "-o", place.options, source, place.merged)
        assert run("findmnt", "-rno", "SOURCE", place.merged) == "overt\n"
        run("umount", "-c", place.merged)


def test_each_of_many_that_are_mounted_at_once_has_a_device_of_its_own(place: Place) -> None:
    server = start(str(place.base / "socket"))
    places = [place.base / f"merged{number}" for number in range(16)]

    def mount(target: Path) -> None:
        target.mkdir()
        with Client(server.path) as client:
            client.mount(str(target), f"lowerdir={place.lower}")

    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(mount, places))
        assert len({os.stat(target).st_dev for target in places}) == len(places)
        assert os.readlink(f"/proc/{server.process.pid}/cwd") == os.getcwd()
    finally:
        assert server.stop() == 0
