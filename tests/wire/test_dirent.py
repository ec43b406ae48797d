"""getdents64 buffers, real and malformed."""

import ctypes
import os
from pathlib import Path
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overt.wire.dirent import parse

SYS_GETDENTS64 = {"x86_64": 217, "aarch64": 61, "riscv64": 61}


def record(ino: int, kind: int, name: bytes) -> bytes:
    length = 19 + len(name) + 1 + 7 & ~7
    return pack(f"=QqHB{length - 19}s", ino, 0, length, kind, name)


NAMES = st.binary(min_size=1, max_size=255).map(lambda name: name.replace(b"\0", b"n"))
ENTRIES = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 255), NAMES))


@given(ENTRIES, st.binary(max_size=40))
def test_entries_come_back_in_order_and_nothing_after_size_is_read(
    entries: list[tuple[int, int, bytes]], rest: bytes
) -> None:
    data = b"".join(record(*entry) for entry in entries)
    for buffer in (data + rest, bytearray(data + rest), memoryview(data + rest)):
        assert parse(buffer, len(data)) == entries


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_parsed_or_are_a_value_error(data: bytes) -> None:
    try:
        parse(data, len(data))
    except ValueError as error:
        assert "getdents64" in str(error)


@pytest.mark.parametrize("length", [0, 18, 19, 23, 32, 65535])
def test_a_record_with_a_wrong_length_is_a_value_error(length: int) -> None:
    with pytest.raises(ValueError, match="after 1 entries"):
        parse(record(1, 8, b"good") + pack("=QqHB5s", 2, 0, length, 8, b"abcde"), 24 + 24)


def test_a_real_directory_is_read_as_scandir_reads_it(tmp_path: Path) -> None:
    number = SYS_GETDENTS64.get(os.uname().machine)
    if number is None:
        pytest.skip(f"the number of getdents64 on {os.uname().machine} is not known here")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "ü\n").write_text("")
    (tmp_path / ("n" * 255)).write_text("")
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        space = ctypes.create_string_buffer(4096)
        size = ctypes.CDLL(None, use_errno=True).syscall(number, fd, space, len(space))
    finally:
        os.close(fd)
    entries = {name: (ino, kind) for ino, kind, name in parse(space.raw, size)}
    assert entries.pop(b".")[1] == entries.pop(b"..")[1] == 4
    expected = {os.fsencode(entry.name): entry.inode() for entry in os.scandir(tmp_path)}
    assert {name: ino for name, (ino, _) in entries.items()} == expected
    assert {name: kind for name, (_, kind) in entries.items()} == {
        b"directory": 4, b"link": 10, "ü\n".encode(): 8, b"n" * 255: 8,
    }  # fmt: skip
