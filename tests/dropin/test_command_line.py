"""The command line of fuse-overlayfs, as its callers use it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import MAIN, SOURCE, Place

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]


def ended(path: Path) -> bool:
    return not os.path.ismount(path)


def test_as_podman_calls_it(place: Place) -> None:
    """Relative layers, the options in one word, the mount point last; the output ends when the mount is there."""
    done = place.call("-o", "lowerdir=lower,upperdir=upper,workdir=work,,nodev", place.merged)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (place.merged / "new").write_text("x")
    place.umount()
    assert (place.upper / "new").read_text() == "x"


def test_options_in_any_place_and_number(place: Place) -> None:
    done = place.call("-olowerdir=lower", place.merged, "-s", "-o", "upperdir=upper,clone_fd", "-oworkdir=work")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(os.listdir(place.merged)) == ["dir", "of0", "of1", "of50"]


def test_a_layer_may_be_named_again(place: Place) -> None:
    done = place.call("-o", f"lowerdir={place.lower}:{place.lower},volatile,workdir=work", place.merged)
    assert done.returncode == 0, done.stderr
    with pytest.raises(OSError, match="Read-only"):
        (place.merged / "new").touch()


def test_what_is_unknown_is_passed_over_aloud(place: Place) -> None:
    done = place.call("-Q", "-o", f"{place.options},shiny,colour=blue", place.merged)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        f"fuse-overlayfs: unknown argument ignored: {what}" for what in ("-Q", "shiny", "colour=blue")
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-o", "lowerdir=lower"], "no mountpoint specified"),
        (["-o", "lowerdir=lower", "merged", "lower"], "too many mount points"),
        (["merged"], "no lowerdir specified"),
        (["merged", "-o"], "-o needs a value"),
        (["-o", "lowerdir=lower,upperdir=upper", "merged"], "needs workdir="),
        (["-o", "lowerdir=missing", "merged"], "missing: No such file or directory"),
        (["-o", "lowerdir=lower,plugins=/x.so", "merged"], "plugins"),
        (["-o", "lowerdir=lower,redirect_dir=maybe", "merged"], "redirect_dir=maybe"),
        (["-o", "lowerdir=lower,uidmapping=0:1", "merged"], "uidmapping=0:1: not STORED:SHOWN:LENGTH"),
        (["-o", "lowerdir=lower,timeout=soon", "merged"], "timeout=soon"),
        (["-o", "lowerdir=lower", "missing"], "missing: no such directory"),
    ],
)
def test_a_failure_is_one_line_and_exit_status_1(place: Place, words: list[str], said: str) -> None:
    done = place.call(*words)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done.stderr
    assert said in done.stderr
    assert ended(place.merged)


def test_a_context_needs_selinux(place: Place) -> None:
    if os.path.isdir("/sys/fs/selinux/booleans"):
        pytest.skip("SELinux is on")
    done = place.call("-o", f'{place.options},context="system_u:object_r:container_file_t:s0:c1,c2"', place.merged)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "context=system_u:object_r:container_file_t:s0:c1,c2: SELinux is not on here" in done.stderr


def test_version_and_help(place: Place) -> None:
    version = place.call("--version")
    assert version.returncode == 0
    assert version.stdout.splitlines()[0].startswith("fuse-overlayfs: version 1.")
    assert version.stdout.splitlines()[1].startswith("overt: version ")
    assert place.call("-h").stdout.startswith("usage: fuse-overlayfs")


def test_devices_do_not_work_unless_asked_for(place: Place) -> None:
    os.mknod(place.lower / "null", 0o666 | 0o020000, os.makedev(1, 3))
    with pytest.raises(PermissionError):
        (place.mount() / "null").read_bytes()
    place.umount()
    assert (place.mount("dev") / "null").read_bytes() == b""


def test_volatile_and_fsync_0_are_one(place: Place) -> None:
    for option in ("volatile", "fsync=0"):
        place.mount(option)
        mark = place.work / "work/incompat/volatile"
        assert mark.is_dir()
        place.umount()
        for directory in (mark, mark.parent):
            directory.rmdir()


def test_in_the_foreground(place: Place) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, str(SOURCE), "-f", "-o", place.options, str(place.merged)],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        while ended(place.merged) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None
        place.umount()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate(timeout=20)
