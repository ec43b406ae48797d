"""Every record and constant of overt.wire.fuse, asked of a C compiler and <linux/fuse.h>.

The installed header may be older than the protocol that overt speaks. What it does not know is skipped by name, so that
the test's output tells what was not checked; sizes and values of that part are asserted from the protocol, by hand.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from overt.wire import dirent, fuse
from overt.wire.record import offsets_of, size_of

Record = type[tuple[Any, ...]]

# The protocol's minor version that brought a record, a field or a constant, where <linux/fuse.h> of 7.31 lacks it.
SINCE_RECORD = {
    "SxTime": 39, "Statx": 39, "StatxIn": 39, "StatxOut": 39, "SuppGroups": 39, "BackingMap": 40, "NotifyPruneOut": 45,
    "CopyFileRangeOut": 45, "ExtHeader": 38, "SecctxHeader": 36, "Secctx": 36, "SyncfsIn": 34,
}  # fmt: skip
SINCE_FIELD = {
    ("OpenOut", "backing_id"): 40, ("InitOut", "max_stack_depth"): 40, ("InitOut", "request_timeout"): 43,
    ("InitOut", "flags2"): 36, ("InitIn", "flags2"): 36, ("Attr", "flags"): 32, ("OpenIn", "open_flags"): 33,
    ("CreateIn", "open_flags"): 33, ("SetxattrIn", "setxattr_flags"): 33, ("InHeader", "total_extlen"): 38,
    ("NotifyInvalEntryOut", "flags"): 38,
}  # fmt: skip
# Enumerators cannot be tested for with #ifdef.
SINCE_CONSTANT = {
    "FUSE_SYNCFS": 34, "FUSE_TMPFILE": 37, "FUSE_STATX": 39, "FUSE_COPY_FILE_RANGE_64": 45, "FUSE_MAX_NR_SECCTX": 38,
    "FUSE_EXT_GROUPS": 39, "FUSE_NOTIFY_RESEND": 40, "FUSE_NOTIFY_INC_EPOCH": 44, "FUSE_NOTIFY_PRUNE": 45,
}  # fmt: skip
# The head of a longer struct, as older kernels send it: (the struct, its length)
PREFIXES = {"SetxattrInCompat": (fuse.SetxattrIn, 8), "InitInCompat": (fuse.InitIn, 16)}

RECORDS: dict[str, Record] = {
    name: value for name, value in vars(fuse).items() if isinstance(value, type) and issubclass(value, tuple)
}
CONSTANTS: dict[str, int] = {
    name: value for name, value in vars(fuse).items() if re.match(r"(FUSE|FATTR|FOPEN)_", name)
}


def struct_name(record: str) -> str:
    return "fuse_" + re.sub(r"(?<!^)([A-Z])", r"_\1", record).lower()


def enumerators() -> set[str]:
    """Opcodes, notification codes and extension types; every other constant is a macro."""
    names = list(CONSTANTS)
    opcodes = names[names.index("FUSE_LOOKUP") : names.index("FUSE_COPY_FILE_RANGE_64") + 1]
    codes = names[names.index("FUSE_NOTIFY_POLL") : names.index("FUSE_NOTIFY_PRUNE") + 1]
    return {*opcodes, *codes, "FUSE_MAX_NR_SECCTX", "FUSE_EXT_GROUPS"}


def guarded(since: int, line: str) -> str:
    return f"#if FUSE_KERNEL_MINOR_VERSION >= {since}\n{line}\n#endif" if since else line


def source() -> str:
    lines = ["#include <stdio.h>", "#include <stddef.h>", "#include <sys/ioctl.h>", "#include <linux/fuse.h>",
             "int main(void) {", 'printf("minor %d\\n", FUSE_KERNEL_MINOR_VERSION);']  # fmt: skip
    for name, record in RECORDS.items():
        if name in PREFIXES:
            continue
        struct = struct_name(name)
        since = SINCE_RECORD.get(name, 0)
        lines.append(guarded(since, f'printf("{name} %zu\\n", sizeof(struct {struct}));'))
        for field in record._fields:  # type: ignore[attr-defined]
            line = f'printf("{name}.{field} %zu\\n", offsetof(struct {struct}, {field}));'
            lines.append(guarded(max(since, SINCE_FIELD.get((name, field), 0)), line))
    for name in CONSTANTS:
        line = f'printf("{name} %llu\\n", (unsigned long long)({name}));'
        if name in enumerators():
            lines.append(guarded(SINCE_CONSTANT.get(name, 0), line))
        else:
            lines.append(f"#ifdef {name}\n{line}\n#endif")
    return "\n".join([*lines, "return 0;", "}", ""])


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the compiler says: sizes and offsets in bytes, and values, by name."""
    if shutil.which("gcc") is None or not Path("/usr/include/linux/fuse.h").exists():
        pytest.skip("not checked: gcc and <linux/fuse.h> (Debian: gcc, linux-libc-dev) are needed")
    directory = tmp_path_factory.mktemp("header")
    (directory / "ask.c").write_text(source())
    subprocess.run(["gcc", "-Wall", "-o", "ask", "ask.c"], cwd=directory, check=True, timeout=60)
    answer = subprocess.run(["./ask"], cwd=directory, check=True, timeout=10, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in answer.splitlines())}


def skip_younger(header: dict[str, int]) -> None:
    """What this machine's header does not have is held against the protocol's sizes, further down."""
    pytest.skip(f"younger than <linux/fuse.h> here, 7.{header['minor']}: checked by hand below (pytest -v names them)")


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_laid_out_as_the_header_says(name: str, header: dict[str, int]) -> None:
    record = RECORDS[name]
    if name in PREFIXES:
        whole, length = PREFIXES[name]
        assert size_of(record) == length
        assert offsets_of(record) == {key: at for key, at in offsets_of(whole).items() if at < length}
        return
    if name not in header:
        assert header["minor"] < SINCE_RECORD[name]
        skip_younger(header)
    assert size_of(record) == header[name]
    missing = []
    for field, offset in offsets_of(record).items():
        if f"{name}.{field}" in header:
            assert offset == header[f"{name}.{field}"], field
        else:
            assert header["minor"] < SINCE_FIELD[name, field]
            missing.append(field)
    if missing:
        skip_younger(header)


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_has_the_value_that_the_header_gives_it(name: str, header: dict[str, int]) -> None:
    if name not in header:
        assert header["minor"] < 46, f"{name} is in no <linux/fuse.h>"
        skip_younger(header)
    assert header[name] == CONSTANTS[name]


def test_what_came_after_7_38_has_the_sizes_and_values_of_the_protocol() -> None:
    assert {name: size_of(RECORDS[name]) for name, since in SINCE_RECORD.items() if since > 38} == {
        "SxTime": 16, "Statx": 256, "StatxIn": 24, "StatxOut": 288, "SuppGroups": 4, "BackingMap": 16,
        "NotifyPruneOut": 16, "CopyFileRangeOut": 8,
    }  # fmt: skip
    assert offsets_of(fuse.StatxOut)["stat"] == 32
    assert offsets_of(fuse.Statx) == {
        "mask": 0, "blksize": 4, "attributes": 8, "nlink": 16, "uid": 20, "gid": 24, "mode": 28, "ino": 32, "size": 40,
        "blocks": 48, "attributes_mask": 56, "atime": 64, "btime": 80, "ctime": 96, "mtime": 112, "rdev_major": 128,
        "rdev_minor": 132, "dev_major": 136, "dev_minor": 140,
    }  # fmt: skip
    assert offsets_of(fuse.OpenOut)["backing_id"] == 12
    assert offsets_of(fuse.InitOut)["max_stack_depth"] == 36
    assert offsets_of(fuse.InitOut)["request_timeout"] == 40
    assert (fuse.FUSE_STATX, fuse.FUSE_COPY_FILE_RANGE_64) == (52, 53)
    flags = [
        fuse.FUSE_CREATE_SUPP_GROUP, fuse.FUSE_DIRECT_IO_ALLOW_MMAP, fuse.FUSE_PASSTHROUGH, fuse.FUSE_NO_EXPORT_SUPPORT,
        fuse.FUSE_HAS_RESEND, fuse.FUSE_ALLOW_IDMAP, fuse.FUSE_OVER_IO_URING, fuse.FUSE_REQUEST_TIMEOUT,
        fuse.FUSE_HAS_SYNCFS,
    ]  # fmt: skip
    assert [flag.bit_length() - 1 for flag in flags] == [34, 36, 37, 38, 39, 40, 41, 42, 43]
    assert fuse.FOPEN_PASSTHROUGH == 0x80
    # _IOC(direction, 229, number, size)
    numbers = [2 << 30 | 4 << 16, 1 << 30 | size_of(fuse.BackingMap) << 16 | 1, 1 << 30 | 4 << 16 | 2, 3]
    assert [number | 229 << 8 for number in numbers] == [
        fuse.FUSE_DEV_IOC_CLONE, fuse.FUSE_DEV_IOC_BACKING_OPEN, fuse.FUSE_DEV_IOC_BACKING_CLOSE,
        fuse.FUSE_DEV_IOC_SYNC_INIT,
    ]  # fmt: skip


def test_the_dirent_is_laid_out_as_the_kernel_writes_it() -> None:
    assert offsets_of(dirent.LinuxDirent64) == {"d_ino": 0, "d_off": 8, "d_reclen": 16, "d_type": 18}
    assert dirent.NAME_OFFSET == 19
