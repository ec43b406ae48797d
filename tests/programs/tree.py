"""A tree of everything that a filesystem can hold, and what tells two such trees apart."""

import hashlib
import os
import random
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

# POSIX ACLs as the kernel keeps them: version 2, then (tag, permissions, id) each (linux/posix_acl_xattr.h).
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER, _NOBODY_IN_PARTICULAR = 0x01, 0x02, 0x04, 0x10, 0x20, 0xFFFFFFFF


def acl(user: int, permissions: int) -> bytes:
    """An ACL that gives one further user permissions."""
    entries = (
        (_USER_OBJ, 7, _NOBODY_IN_PARTICULAR), (_USER, permissions, user), (_GROUP_OBJ, 5, _NOBODY_IN_PARTICULAR),
        (_MASK, 7, _NOBODY_IN_PARTICULAR), (_OTHER, 1, _NOBODY_IN_PARTICULAR),
    )  # fmt: skip
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def plant(root: Path, files: int, seed: int = 1) -> None:
    """Make `files` regular files in directories below `root`, and beside them one of each other kind."""
    choose = random.Random(seed)
    root.mkdir(exist_ok=True)
    for number in range(files):
        directory = root / f"d{number % 37}" / f"e{number % 11}" / ("ü" * (number % 5) or "x")
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / f"file {number}"
        file.write_bytes(choose.randbytes(choose.choice((0, 10, 1000, 5000, 70_000 if number % 50 == 0 else 3000))))
        os.chown(file, choose.randrange(3) * 1000, choose.randrange(3) * 1000)
        file.chmod(choose.choice((0o644, 0o600, 0o755, 0o4755, 0o2755, 0o444)))
        if number % 7 == 0:
            os.link(file, root / f"d{number // 2 % 37}" / f"link{number}")
        if number % 11 == 0:
            os.setxattr(file, "user.colour", choose.randbytes(choose.randrange(200)))
        if number % 13 == 0:
            os.setxattr(file, "system.posix_acl_access", acl(1000 + number % 3, 6))
        if number % 17 == 0:
            (directory / f"symlink{number}").symlink_to(f"../file {number}")
        os.utime(file, ns=(10**18, 10**18 + choose.randrange(10**17)))
    special = root / "special"
    special.mkdir()
    os.setxattr(special, "system.posix_acl_default", acl(1001, 5))
    os.setxattr(special, "trusted.of", b"root")
    os.mkfifo(special / "fifo", 0o640)
    os.mknod(special / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(special / "block", 0o600 | stat.S_IFBLK, os.makedev(7, 200))
    (special / ("n" * 255)).write_text("a name as long as a name may be")
    (special / "dangling").symlink_to("x" * 4000)
    with open(special / "sparse", "wb") as sparse:
        sparse.truncate(20 << 20)
        sparse.seek(7 << 20)
        sparse.write(b"an island")
    (special / "sticky").mkdir()
    (special / "sticky").chmod(0o3777)
    os.setxattr(special / "sparse", "security.capability", struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0))
    for directory, _, _ in os.walk(root, topdown=False):
        os.utime(directory, ns=(10**18, 10**18 + 5))


def manifest(root: Path) -> dict[str, object]:
    """Everything about each file below `root` that a copy must have too; hard links by the first of their names."""
    first: dict[tuple[int, int], str] = {}
    found: dict[str, object] = {}
    for path in _below(root):
        name = str(path.relative_to(root))
        st = path.lstat()
        content: object = None
        if stat.S_ISREG(st.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(st.st_mode):
            content = os.readlink(path)
        same = None if stat.S_ISDIR(st.st_mode) else first.setdefault((st.st_dev, st.st_ino), name)
        sizes = None if stat.S_ISDIR(st.st_mode) else (st.st_size, st.st_nlink)
        owner = (oct(st.st_mode), st.st_uid, st.st_gid)
        found[name] = (owner, st.st_rdev, sizes, st.st_mtime_ns, same, content, _xattrs(path))
    return found


def _below(root: Path) -> Iterator[Path]:
    for directory, directories, files in os.walk(root):
        directories.sort()
        for name in sorted([*directories, *files]):
            yield Path(directory, name)


def _xattrs(path: Path) -> dict[str, str]:
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in names}


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Where two manifests differ, for people."""
    names = [name for name in sorted(one | other) if one.get(name) != other.get(name)]
    return [f"{name}: {one.get(name)} | {other.get(name)}" for name in names[:20]]
