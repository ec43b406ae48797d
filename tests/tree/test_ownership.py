"""Whose files are, and what a caller may do: as the kernel decides it for the calling user."""

import ctypes
import errno
import mmap
import os
import platform
import shutil
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overt.host import mounts, process

from .ground import Ground, Layers, as_user, describe, libc, link_open, xattrs

USER, GROUP = 1000, 1001

READ, WRITE, EXECUTE = 4, 2, 1
USER_OBJ, NAMED_USER, GROUP_OBJ, MASK, OTHER = 0x01, 0x02, 0x04, 0x10, 0x20


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An ACL as the xattr has it: (tag, permissions, id) each (acl(5), linux/posix_acl_xattr.h)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, may, who & 0xFFFFFFFF) for tag, may, who in entries)


CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
"""cap_net_raw=ep (linux/capability.h, struct vfs_cap_data)"""
DEFAULT = acl((USER_OBJ, 7, -1), (NAMED_USER, 6, 1005), (GROUP_OBJ, 5, -1), (MASK, 7, -1), (OTHER, 0, -1))
ACCESS = acl((USER_OBJ, 6, -1), (NAMED_USER, 4, 1005), (GROUP_OBJ, 0, -1), (MASK, 4, -1), (OTHER, 0, -1))


def owner(path: Path) -> tuple[int, int, int]:
    st = os.lstat(path)
    return st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)


def without(capability: str, call: Callable[[], Any]) -> Any:
    """What `call` returns, or raises, where root lacks a capability."""

    def do() -> Any:
        process.keep_capabilities(process.capabilities() - {capability})
        return call()

    return as_user(0, do)


@pytest.fixture
def root(layers: Layers) -> Path:
    """An overlay in which everybody may do everything; the lower layer has dir and gone."""
    (layers.lower / "dir").mkdir()
    (layers.lower / "gone").touch()
    for layer in (layers.lower, layers.upper):
        layer.chmod(0o777)
    (layers.lower / "dir").chmod(0o777)
    path = layers.mount()
    os.unlink(path / "gone")
    return path


@pytest.mark.parametrize("name", ["new", "dir/new", "gone"])
def test_files_are_made_as_the_caller(root: Path, name: str) -> None:
    path = root / name

    def make_all() -> None:
        os.umask(0o027)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o666))
        for number, make in enumerate((os.mkfifo, os.mkdir)):
            make(path.with_name(f"more{number}"), 0o777)
        os.symlink("x", path.with_name("link"))
        fd = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
        link_open(fd, path.with_name("nameless"))

    as_user(USER, make_all, gid=GROUP)
    assert owner(path) == (USER, GROUP, 0o640)
    assert owner(path.with_name("more0")) == (USER, GROUP, 0o750)
    assert owner(path.with_name("more1")) == (USER, GROUP, 0o750)
    assert owner(path.with_name("link")) == (USER, GROUP, 0o777)
    assert owner(path.with_name("nameless")) == (USER, GROUP, 0o640)
    (root / "roots").touch()
    assert owner(root / "roots")[:2] == (0, 0)


def test_supplementary_groups_count_for_permission_and_not_for_ownership(root: Path) -> None:
    (root / "theirs").mkdir()
    os.chown(root / "theirs", 0, GROUP)
    os.chmod(root / "theirs", 0o770)
    with pytest.raises(PermissionError):
        as_user(USER, lambda: (root / "theirs" / "file").touch())
    as_user(USER, lambda: (root / "theirs" / "file").touch(), groups=(GROUP,))
    assert owner(root / "theirs" / "file")[:2] == (USER, USER)
    as_user(USER, lambda: os.chown(root / "theirs" / "file", -1, GROUP), groups=(GROUP,))
    assert owner(root / "theirs" / "file")[:2] == (USER, GROUP)


@pytest.mark.parametrize("name", ["new", "gone"])
def test_setgid_directories_hand_their_group_on(layers: Layers, name: str) -> None:
    (layers.lower / "dir").mkdir()
    for child in ("gone", "gonedir"):
        (layers.lower / "dir" / child).touch()
    os.chown(layers.lower / "dir", 0, GROUP)
    (layers.lower / "dir").chmod(0o2777)
    root = layers.mount() / "dir"
    for child in ("gone", "gonedir"):
        os.unlink(root / child)

    def make() -> None:
        os.umask(0)
        os.close(os.open(root / name, os.O_CREAT | os.O_WRONLY, 0o2775))
        os.mkdir(root / f"{name}dir", 0o755)

    as_user(USER, make)
    assert owner(root / name) == (USER, GROUP, 0o0775), "who is not in the group does not get the bit (mode_strip_sgid)"
    assert owner(root / f"{name}dir") == (USER, GROUP, 0o2755)
    with layers.kernel() as path:
        assert owner(path / "dir" / f"{name}dir") == (USER, GROUP, 0o2755)


@pytest.mark.parametrize("name", ["new", "gone"])
@pytest.mark.parametrize("where", ["lower", "upper"])
def test_default_acls_are_handed_on(layers: Layers, name: str, where: str) -> None:
    """What is made over a whiteout is made elsewhere and moved; that must not show."""
    directory = getattr(layers, where) / "dir"
    directory.mkdir(0o777)
    if where == "upper":
        (layers.lower / "dir").mkdir()
    for child in ("gone", "gonedir", "gonelink", "goneother"):
        (layers.lower / "dir" / child).touch()
    os.setxattr(directory, "system.posix_acl_default", DEFAULT)
    root = layers.mount() / "dir"
    for child in os.listdir(root):
        os.unlink(root / child)

    def make() -> None:
        os.umask(0o077)  # does not count where there is a default ACL (acl(5))
        os.close(os.open(root / name, os.O_CREAT | os.O_WRONLY, 0o660))
        os.mkdir(root / f"{name}dir", 0o777)
        os.symlink("x", root / f"{name}link")
        fd = os.open(root, os.O_TMPFILE | os.O_WRONLY, 0o660)
        link_open(fd, root / f"{name}other")

    os.chmod(root, 0o777)
    as_user(USER, make)
    expected = {child: (owner(root / child), xattrs(root / child)) for child in sorted(os.listdir(root))}
    inherited = acl((USER_OBJ, 6, -1), (NAMED_USER, 6, 1005), (GROUP_OBJ, 5, -1), (MASK, 6, -1), (OTHER, 0, -1))
    assert expected[name] == ((USER, USER, 0o660), {"system.posix_acl_access": inherited})
    assert expected[f"{name}other"] == expected[name]
    assert expected[f"{name}dir"][1]["system.posix_acl_default"] == DEFAULT
    assert expected[f"{name}link"][1] == {}
    with layers.kernel() as path:
        assert {child: (owner(path / "dir" / child), xattrs(path / "dir" / child)) for child in expected} == expected


def test_acls_are_obeyed_and_carried(layers: Layers) -> None:
    (layers.lower / "file").write_text("text")
    (layers.lower / "file").chmod(0o600)
    os.setxattr(layers.lower / "file", "system.posix_acl_access", ACCESS)
    root = layers.mount()
    assert as_user(1005, lambda: (root / "file").read_text()) == "text"
    with pytest.raises(PermissionError):
        as_user(1006, lambda: (root / "file").read_text())
    with pytest.raises(PermissionError):
        as_user(1005, lambda: (root / "file").write_text("x"))
    os.utime(root / "file")
    assert os.getxattr(layers.upper / "file", "system.posix_acl_access") == ACCESS
    assert as_user(1005, lambda: (root / "file").read_text()) == "text"
    os.chmod(root / "file", 0o600)  # the group bits are the ACL's mask
    with pytest.raises(PermissionError):
        as_user(1005, lambda: (root / "file").read_text())
    os.removexattr(root / "file", "system.posix_acl_access")
    assert os.listxattr(root / "file") == []


def test_setting_an_acl_takes_setgid_from_a_file_of_a_strange_group(root: Path) -> None:
    (root / "file").touch()
    os.chown(root / "file", USER, GROUP)
    os.chmod(root / "file", 0o2755)
    as_user(USER, lambda: os.setxattr(root / "file", "system.posix_acl_access", ACCESS))
    assert owner(root / "file")[2] & stat.S_ISGID == 0


def test_sticky_directories(root: Path) -> None:
    os.chmod(root / "dir", 0o1777)
    as_user(USER, lambda: (root / "dir" / "file").touch())
    for call in (lambda: os.unlink(root / "dir" / "file"), lambda: os.rename(root / "dir" / "file", root / "mine")):
        with pytest.raises(PermissionError):
            as_user(USER + 1, call)
    as_user(USER, lambda: os.unlink(root / "dir" / "file"))


def test_only_owners_change_what_owners_change(root: Path) -> None:
    (root / "file").touch()
    os.chmod(root / "file", 0o666)
    for call in (
        lambda: os.chmod(root / "file", 0o777),
        lambda: os.chown(root / "file", USER, -1),
        lambda: os.utime(root / "file", (1, 1)),
        lambda: os.setxattr(root / "file", "trusted.x", b"1"),
        lambda: os.setxattr(root / "file", "security.capability", CAPABILITY),
    ):
        with pytest.raises(PermissionError):
            as_user(USER, call)
    as_user(USER, lambda: os.utime(root / "file"))
    as_user(USER, lambda: os.setxattr(root / "file", "user.x", b"1"))
    os.setxattr(root / "file", "trusted.x", b"1")
    assert as_user(USER, lambda: os.listxattr(root / "file")) == ["user.x"]
    assert sorted(os.listxattr(root / "file")) == ["trusted.x", "user.x"]
    assert without("sys_admin", lambda: os.listxattr(root / "file")) == ["user.x"], "as a container's root is"
    assert sorted(without("fsetid", lambda: os.listxattr(root / "file"))) == ["trusted.x", "user.x"]


# Bits that a change takes away


@pytest.fixture(params=["lower", "upper"])
def program(request: pytest.FixtureRequest, data_layers: Layers) -> Path:
    """A setuid and setgid program that everybody may write."""
    path = getattr(data_layers, request.param) / "program"
    path.write_bytes(b"\x7fELF" * 10)
    os.chown(path, 0, GROUP)
    path.chmod(0o6777)
    return data_layers.mount() / "program"


def overwrite(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, b"x")
    os.close(fd)


def test_a_write_takes_setuid_and_setgid_away_but_not_roots(program: Path) -> None:
    overwrite(program)
    assert owner(program) == (0, GROUP, 0o6777)
    as_user(USER, lambda: overwrite(program))
    assert owner(program) == (0, GROUP, 0o0777)


def test_a_write_takes_away_bits_set_after_the_file_was_opened(program: Path) -> None:
    """The way in that this rule is there to close: write through a descriptor that is older than the bit."""
    program.chmod(0o777)
    reading, writing = os.pipe()
    fd = os.open(program, os.O_WRONLY)

    def work() -> int:
        os.read(reading, 1)
        os.write(fd, b"evil")
        return stat.S_IMODE(os.fstat(fd).st_mode)

    os.chmod(program, 0o6777)
    assert os.stat(program).st_mode & 0o7777 == 0o6777
    os.write(writing, b"x")
    assert as_user(USER, work) == 0o777
    for number in (fd, reading, writing):
        os.close(number)
    assert owner(program)[2] == 0o777


@pytest.mark.parametrize("way", ["truncate", "open", "ftruncate", "fallocate", "copy"])
def test_other_changes_of_data_take_them_away_too(program: Path, way: str) -> None:
    def change() -> None:
        if way == "truncate":
            os.truncate(program, 3)
            return
        fd = os.open(program, os.O_RDWR | (os.O_TRUNC if way == "open" else 0))
        if way == "ftruncate":
            os.ftruncate(fd, 3)
        elif way == "fallocate":
            os.posix_fallocate(fd, 0, 1 << 16)
        elif way == "copy":
            os.copy_file_range(fd, fd, 4, 0, 20)
        os.close(fd)

    as_user(USER, change)
    assert owner(program)[2] == 0o777


def test_chown_takes_them_away(program: Path) -> None:
    os.chown(program, USER, -1)
    assert owner(program) == (USER, GROUP, 0o0777)
    os.chmod(program, 0o4755)
    os.chown(program, -1, -1)
    assert owner(program)[2] == 0o755
    os.chmod(program, 0o2745)
    os.chown(program, 0, GROUP)
    assert owner(program)[2] == 0o2745, "without execution by the group it is no privilege, and root may leave it"
    folder = program.parent / "folder"
    folder.mkdir()
    os.chmod(folder, 0o2755)
    os.chown(folder, USER, -1)
    assert owner(folder)[2] == 0o2755, "of a directory it takes nothing"


def test_a_stranger_cannot_take_them_away_by_a_chown_that_names_nobody(program: Path) -> None:
    """To the server it looks like a write, which may."""
    for way in (os.chown, os.lchown):
        with pytest.raises(PermissionError):
            as_user(USER, lambda way=way: way(program, -1, -1))
    assert owner(program) == (0, GROUP, 0o6777)
    os.chmod(program, 0o2745)
    with pytest.raises(PermissionError):
        as_user(USER, lambda: os.chown(program, -1, -1))
    as_user(USER, lambda: os.chown(program, -1, -1), groups=(GROUP,))  # of a member's own group it takes nothing
    assert owner(program) == (0, GROUP, 0o2745)
    os.chmod(program, 0o777)
    as_user(USER, lambda: os.chown(program, -1, -1))


def test_chmod_by_a_stranger_to_the_group_does_not_set_setgid(program: Path) -> None:
    os.chown(program, USER, GROUP)
    as_user(USER, lambda: os.chmod(program, 0o2755))
    assert owner(program)[2] == 0o755
    as_user(USER, lambda: os.chmod(program, 0o2755), groups=(GROUP,))
    assert owner(program)[2] == 0o2755


def test_a_write_takes_file_capabilities_away(program: Path) -> None:
    os.setxattr(program, "security.capability", CAPABILITY)
    assert os.getxattr(program, "security.capability") == CAPABILITY
    overwrite(program)  # root's writes too (cap_inode_killpriv)
    assert os.listxattr(program) == []
    os.setxattr(program, "security.capability", CAPABILITY)
    os.chown(program, USER, -1)
    assert os.listxattr(program) == []
    os.chmod(program, 0o755)
    assert owner(program)[:2] == (USER, GROUP)


def test_roots_write_takes_file_capabilities_away_and_no_bits_beside(program: Path) -> None:
    """The kernel says no more of it than of a chown that names nobody, which takes both."""
    name = "security.capability"
    for change, left in (
        (lambda: overwrite(program), 0o6777),
        (lambda: os.truncate(program, 5), 0o6777),
        (lambda: without("fsetid", lambda: overwrite(program)), 0o777),
    ):
        os.chmod(program, 0o6777)
        os.setxattr(program, name, CAPABILITY)
        change()
        assert (os.listxattr(program), owner(program)) == ([], (0, GROUP, left))
    with open(program, "r+b"):
        os.chmod(program, 0o6777)
        os.setxattr(program, name, CAPABILITY)
        os.chown(program, -1, -1)
        assert (os.listxattr(program), owner(program)[2]) == ([], 0o777)


def test_a_chown_that_is_refused_takes_no_capability_away(program: Path) -> None:
    os.setxattr(program, "security.capability", CAPABILITY)

    def chown() -> None:
        fd = os.open(program, os.O_WRONLY)
        for what in (program, fd):
            with pytest.raises(PermissionError):
                os.chown(what, -1, -1)

    as_user(USER, chown)
    assert os.getxattr(program, "security.capability") == CAPABILITY
    assert owner(program) == (0, GROUP, 0o6777)
    as_user(USER, lambda: os.truncate(program, 5))
    assert (os.listxattr(program), owner(program)[2]) == ([], 0o777)


def lchown_32(path: Path) -> int:
    """lchown(path, -1, -1) by the oldest number that i386 has for it, 16; the errno.

    push rbx; mov ebx, edi; mov ecx, 0xffff; mov edx, ecx; mov eax, 16; int 0x80; pop rbx; ret
    """
    code = bytes.fromhex("53 89fb b9ffff0000 89ca b810000000 cd80 5b c3")
    at = libc.mmap(None, 8192, 7, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40, -1, 0)  # MAP_32BIT
    name = bytes(path) + b"\0"
    ctypes.memmove(at, code, len(code))
    ctypes.memmove(at + 4096, name, len(name))
    return -ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(at)(at + 4096)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the 32-bit calls of x86_64")
def test_nor_does_one_by_another_number(program: Path) -> None:
    answer = as_user(USER, lambda: lchown_32(program.parent / "missing"))
    if answer != errno.ENOENT:
        pytest.skip(f"no calls of 32 bits here ({os.strerror(answer)})")
    os.setxattr(program, "security.capability", CAPABILITY)
    assert as_user(USER, lambda: lchown_32(program)) == errno.EPERM
    assert owner(program) == (0, GROUP, 0o6777)
    assert lchown_32(program) == 0
    assert owner(program) == (0, GROUP, 0o777)


def test_a_chown_by_who_may_change_any_file_takes_them_away(program: Path) -> None:
    def chown(uid: int) -> None:
        process.keep_capabilities_across_setfsuid()
        os.setresuid(USER, USER, USER)
        os.chown(program, uid, -1)

    for uid in (-1, USER + 1):
        os.chown(program, 0, -1)
        os.chmod(program, 0o6777)
        os.setxattr(program, "security.capability", CAPABILITY)
        as_user(0, lambda uid=uid: chown(uid))
        assert (os.listxattr(program), owner(program)) == ([], (max(uid, 0), GROUP, 0o777))


def test_setuid_programs_run_as_their_owner(layers: Layers) -> None:
    shutil.copy("/usr/bin/id", layers.lower / "id")
    os.chown(layers.lower / "id", GROUP, GROUP)
    (layers.lower / "id").chmod(0o4755)
    root = layers.mount()
    assert as_user(USER, lambda: os.popen(f"{root}/id -u").read()) == f"{GROUP}\n"
    os.utime(root / "id")
    assert owner(layers.upper / "id") == (GROUP, GROUP, 0o4755)


# Space that is not everybody's


@pytest.fixture(params=[""])
def small(request: pytest.FixtureRequest, ground: Ground) -> Iterator[Path]:
    """A small ext4, a tenth of it reserved for root; `quota` is for one that counts (not every kernel can mount it)."""
    with tempfile.TemporaryDirectory(dir=ground.directory.parent) as name:
        image, point = Path(name, "image"), Path(name, "mnt")
        image.touch()
        os.truncate(image, 64 << 20)
        point.mkdir()
        features = ["-O", "quota", "-E", "quotatype=usrquota"] if request.param == "quota" else []
        subprocess.run(["mkfs.ext4", "-q", "-m", "10", *features, image], check=True, timeout=60)
        mount = subprocess.run(["mount", "-o", "loop", image, point], capture_output=True, timeout=60)
        if features and mount.returncode:
            pytest.skip("this kernel does not mount an ext4 with quotas")
        mount.check_returncode()
        os.chmod(name, 0o755)
        try:
            yield point
        finally:
            mounts.umount(point, mounts.MNT_DETACH)


@pytest.fixture(params=["", "nopassthrough"], ids=["passthrough", "nopassthrough"])
def cramped(request: pytest.FixtureRequest, ground: Ground, quiet: None, small: Path) -> Iterator[Layers]:
    """Layers on it."""
    layers = Layers(Ground(small, ground.client), options=str(request.param))
    layers.upper.chmod(0o777)
    try:
        yield layers
    finally:
        layers.close()


def fill(path: Path, limit: int = 1 << 30) -> tuple[int, int]:
    """Write until it fails or `limit` bytes are there; (how much was written, errno)."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)
    done = 0
    try:
        while done < limit:
            done += os.write(fd, bytes(1 << 16))
        return done, 0
    except OSError as error:
        return done, error.errno or 0
    finally:
        os.close(fd)


def test_reserved_blocks_are_roots_alone(cramped: Layers) -> None:
    """And not for those for whom root's server writes."""
    root = cramped.mount()
    before = os.statvfs(root)
    reserved = (before.f_bfree - before.f_bavail) * before.f_frsize
    assert reserved > 4 << 20
    written, error = as_user(USER, lambda: fill(root / "theirs"))
    assert error == errno.ENOSPC
    after = os.statvfs(root)
    assert after.f_bavail * after.f_frsize < 1 << 20
    assert after.f_bfree * after.f_frsize > reserved * 9 // 10, f"{written} bytes were written"


@pytest.mark.parametrize("small", ["quota"], indirect=True)
def test_quotas_are_the_callers(cramped: Layers) -> None:
    if shutil.which("setquota") is None:
        pytest.skip("no setquota (Debian: quota)")
    limit = 5 << 10  # KiB
    subprocess.run(
        ["setquota", "-u", str(USER), str(limit), str(limit), "20", "20", str(cramped.place.parent)],
        check=True,
        timeout=30,
    )
    root = cramped.mount()
    written, error = as_user(USER, lambda: fill(root / "theirs", 20 << 20))
    assert error == errno.EDQUOT
    assert (limit << 10) - (1 << 18) <= written <= limit << 10
    assert fill(root / "roots", 10 << 20) == (10 << 20, 0)

    def many() -> int:
        for number in range(100):
            try:
                (root / f"file{number}").touch()
            except OSError as error:
                assert error.errno == errno.EDQUOT
                return number
        return 100

    assert as_user(USER, many) == 19


def test_a_full_upper_fails_what_needs_room_and_nothing_else(cramped: Layers) -> None:
    (cramped.lower / "large").write_bytes(b"l" * (20 << 20))
    (cramped.lower / "small").write_text("text")
    root = cramped.mount()
    before_filling = os.statvfs(root).f_bfree
    assert fill(root / "filler")[1] == errno.ENOSPC
    before = describe(root)
    for call in (lambda: os.chmod(root / "large", 0o600), lambda: overwrite(root / "large")):
        with pytest.raises(OSError) as raised:
            call()
        assert raised.value.errno == errno.ENOSPC
    assert describe(root) == before
    assert os.listdir(cramped.work / "work") == []
    os.unlink(root / "filler")
    deadline = time.monotonic() + 10
    while os.statvfs(root).f_bfree < before_filling // 2:  # the kernel forgets the file a moment later
        assert time.monotonic() < deadline
    overwrite(root / "large")
    assert (root / "large").read_bytes() == b"x" + b"l" * ((20 << 20) - 1)


@pytest.mark.parametrize("member", [False, True], ids=["stranger", "member"])
def test_a_setgid_bit_without_execution_is_left_to_members_of_the_group(program: Path, member: bool) -> None:
    groups = (GROUP,) if member else ()
    expected = 0o2766 if member else 0o0766
    changes: list[Callable[[], object]] = [
        lambda: overwrite(program),
        lambda: os.truncate(program, 5),
        lambda: os.close(os.open(program, os.O_WRONLY | os.O_TRUNC)),
    ]
    for change in changes:
        os.chmod(program, 0o2766)
        as_user(USER, change, groups=groups)
        assert owner(program) == (0, GROUP, expected)
    os.chown(program, USER, -1)
    os.chmod(program, 0o2766)
    as_user(USER, lambda: os.chown(program, -1, USER), groups=groups)
    assert owner(program) == (USER, USER, expected)


def test_a_chown_by_root_leaves_the_setgid_bit_of_a_file_that_its_group_may_not_execute(layers: Layers) -> None:
    for name, mode in (("marked", 0o2745), ("program", 0o2755), ("both", 0o6745)):
        (layers.lower / name).touch()
        os.chown(layers.lower / name, 1000, 1000)
        os.chmod(layers.lower / name, mode)
    root = layers.mount()
    for name, mode in (("marked", 0o2745), ("program", 0o755), ("both", 0o2745)):
        os.chown(root / name, -1, 1001)
        assert stat.S_IMODE(os.stat(root / name).st_mode) == mode
