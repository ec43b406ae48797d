"""A server in a user namespace of ten ids, whose layers belong to others: nothing is made in root's name instead."""

import errno
import json
import os
import signal
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overt.host import mounts, process
from overt.lab import bounded

from .scene import overt_command, told

pytestmark = [pytest.mark.root, pytest.mark.timeout(60), pytest.mark.usefixtures("registry")]

IDS = 10
ABSENT = 5000
MAPPED = f"uidmapping=0:1:9:{ABSENT}:0:1,gidmapping=0:1:9:{ABSENT}:0:1"
"""root's files are stored as those of an id that the namespace does not have; who is 1 there is root below"""

CALLS: dict[str, Callable[[Path], object]] = {
    "open": lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)),
    "tmpfile": lambda path: os.close(os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o644)),
    "mkdir": os.mkdir,
    "mkfifo": os.mkfifo,
    "symlink": lambda path: os.symlink("x", path),
    "write": lambda path: (path.parent / "file").write_text("changed"),
    "chown": lambda path: os.chown(path.parent / "file", 0, 0),
}


@pytest.fixture
def base() -> Iterator[Path]:
    """Not tmp_path: other users have to get there."""
    place = Path(tempfile.mkdtemp(prefix="overt-contract-"))
    place.chmod(0o755)
    try:
        yield place
    finally:
        place.rmdir()


def in_a_namespace(base: Path, work: Callable[[Path], object]) -> object:
    """What `work` returns in a user namespace that has the first ids only, and in which `base` is a tmpfs."""
    asked, answer = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            process.die_with_parent(signal.SIGKILL)
            process.unshare(process.CLONE_NEWUSER | process.CLONE_NEWNS)
            os.write(asked[1], b"x")
            os.read(answer[0], 1)
            mounts.attach(mounts.new_mount("tmpfs", [("mode", "755")]), base)
            os.write(asked[1], json.dumps(work(base)).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    try:
        os.close(asked[1])
        assert os.read(asked[0], 1) == b"x"
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{name}").write_text(f"0 0 {IDS}")
        os.write(answer[1], b"x")
        said = os.read(asked[0], 1 << 16)
        assert bounded.wait(pid, 40) == 0
        return json.loads(said)
    finally:
        for fd in (asked[0], *answer):
            os.close(fd)


def makes(base: Path, off: str) -> dict[str, object]:
    """The errno of each call of root's on the mount, and what is in the upper afterwards."""
    for name in ("lower", "upper", "work", "merged"):
        (base / name).mkdir()
    (base / "lower" / "file").write_text("lower")
    options = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work,userxattr,{MAPPED}"
    merged = base / "merged"
    words = overt_command("mount", "-o", options, str(merged), off=off)
    subprocess.run(words, check=True, timeout=30, stdin=subprocess.DEVNULL, capture_output=True)
    try:
        os.chmod(merged, 0o777)
        codes = {name: told(call, merged / name) for name, call in CALLS.items()}
        os.setegid(1)
        os.seteuid(1)
        codes["another's"] = told(CALLS["open"], merged / "another's")
        os.seteuid(0)
        os.setegid(0)
        owners = {path.name: [path.lstat().st_uid, path.lstat().st_gid] for path in base.glob("upper/*")}
        return {"codes": codes, "owners": owners}
    finally:
        subprocess.run(overt_command("umount", str(merged)), timeout=30, stdin=subprocess.DEVNULL, capture_output=True)


def nothing_is_made_for_whom_the_namespace_lacks(base: Path, off: str = "") -> None:
    found = in_a_namespace(base, lambda place: makes(place, off))
    assert isinstance(found, dict)
    # A number that is no id for the caller is EINVAL to chown(2) itself, which has copied the file up by then.
    expected = {**dict.fromkeys(CALLS, errno.EOVERFLOW), "chown": errno.EINVAL, "another's": 0}
    assert found["codes"] == expected
    assert found["owners"] == {"file": [0, 0], "another's": [0, 0]}


def test_nothing_is_made_for_an_id_that_the_namespace_lacks(base: Path) -> None:
    nothing_is_made_for_whom_the_namespace_lacks(base)


def flags(base: Path) -> list[object]:
    """What comes of setting flags there, and of a mark that says immutable."""
    for name in ("lower", "upper", "work", "merged"):
        (base / name).mkdir()
    (base / "lower" / "file").write_text("lower")
    (base / "upper" / "kept").write_text("upper")
    os.setxattr(base / "upper" / "kept", "user.overlay.protattr", b"i")
    options = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
    merged = base / "merged"
    words = overt_command("mount", "-o", options, str(merged))
    subprocess.run(words, check=True, timeout=30, stdin=subprocess.DEVNULL, capture_output=True)

    def call(*words: str | Path) -> object:
        done = subprocess.run(words, check=False, timeout=10, capture_output=True, text=True)
        return done.returncode, done.stdout.partition(" ")[0].replace("-", "")

    try:
        return [
            call("chattr", "+d", merged / "file"), call("lsattr", merged / "file"), call("lsattr", base / "upper/file"),
            call("chattr", "+i", merged / "file"), call("lsattr", merged / "kept"),
            told(os.unlink, merged / "kept"), told(os.unlink, merged / "file"),
        ]  # fmt: skip
    finally:
        subprocess.run(overt_command("umount", str(merged)), timeout=30, stdin=subprocess.DEVNULL, capture_output=True)


def test_flags_are_set_there_as_far_as_the_kernel_lets(base: Path) -> None:
    """Immutable and append-only are for those who have CAP_LINUX_IMMUTABLE outside (fileattr_set_prepare)."""
    answers = [[0, ""], [0, "d"], [0, "d"], [1, ""], [0, "i"], errno.EPERM, 0]
    assert in_a_namespace(base, flags) == answers


def test_where_setfsuid_is_not_asked_whether_it_succeeded_it_is_made_as_roots(base: Path) -> None:
    with pytest.raises(AssertionError, match="'open': 0"):
        nothing_is_made_for_whom_the_namespace_lacks(base, "asking")
