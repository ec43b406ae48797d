"""Replies have the layout of the protocol, and each request gets one."""

import os
from errno import ENOENT
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overt.fuse import notify
from overt.fuse.attr import attr_of, validity
from overt.fuse.directory import DirBuffer
from overt.fuse.session import Session
from overt.wire import fuse
from overt.wire.record import pack, struct_of, unpack_from

ATTR = fuse.Attr(5, 6, 7, -8, 9, 10, 11, 12, 13, 0o100644, 1, 1000, 100, 0, 4096, 0)
VALID = validity(1_500_000_000, 3_000_000_007)
TIMES = (1, 3, 500_000_000, 7)


@pytest.fixture
def session(kernel: Any) -> Session:
    """A session with request 4 in flight."""
    session: Session = kernel.session()
    data = kernel.request("GETATTR", 4)
    session.decode(data, len(data))
    return session


def test_an_error_is_negative_on_the_wire(session: Session, kernel: Any) -> None:
    assert kernel.header(session.error(4, ENOENT)) == (16, -ENOENT, 4)


def test_an_empty_reply_is_a_header(session: Session, kernel: Any) -> None:
    assert kernel.header(session.empty(4)) == (16, 0, 4)


def test_an_entry(session: Session, kernel: Any) -> None:
    assert kernel.body(session.entry(4, 20, 21, VALID, pack(ATTR)), fuse.EntryOut) == (20, 21, *TIMES, *ATTR)


def test_a_negative_entry_has_a_timeout_and_no_node(session: Session, kernel: Any) -> None:
    assert kernel.body(session.negative(4, VALID), fuse.EntryOut) == (0, 0, *TIMES, *[0] * 16)


def test_attributes(session: Session, kernel: Any) -> None:
    assert kernel.body(session.attr(4, VALID, pack(ATTR)), fuse.AttrOut) == (3, 7, *ATTR)


def test_statx(session: Session, kernel: Any) -> None:
    time = fuse.SxTime(-1, 5)
    stat = fuse.Statx(0xFFF, 4096, 1, 2, 3, 4, 0o100644, 5, 6, 7, 8, time, time, time, time, 9, 10, 11, 12)
    body = kernel.body(session.statx(4, VALID, stat), fuse.StatxOut)
    assert body[:3] == (3, 7, 0)
    assert body[3:] == struct_of(fuse.Statx).unpack(pack(stat))


def test_an_open_file(session: Session, kernel: Any) -> None:
    reply = session.opened(4, 1 << 63, fuse.FOPEN_PASSTHROUGH, 3)
    assert kernel.body(reply, fuse.OpenOut) == (1 << 63, fuse.FOPEN_PASSTHROUGH, 3)


def test_a_created_file_is_an_entry_and_an_open_file(session: Session, kernel: Any) -> None:
    reply = session.created(4, 20, 21, VALID, pack(ATTR), 9, fuse.FOPEN_KEEP_CACHE, 2)
    assert kernel.body(reply, fuse.EntryOut, fuse.OpenOut) == (20, 21, *TIMES, *ATTR, 9, fuse.FOPEN_KEEP_CACHE, 2)


def test_data_and_its_header_alone(session: Session, kernel: Any) -> None:
    assert session.data(4, b"target") == struct_of(fuse.OutHeader).pack(22, 0, 4) + b"target"
    data = kernel.request("READ", 4)
    session.decode(data, len(data))
    assert session.data_header(4, 6) == struct_of(fuse.OutHeader).pack(22, 0, 4)


@pytest.mark.parametrize(
    ("encoder", "arguments", "record", "body"),
    [
        ("written", (4096,), fuse.WriteOut, (4096,)),
        ("copied", (1 << 40,), fuse.CopyFileRangeOut, (1 << 40,)),
        ("statfs", (fuse.Kstatfs(1, 2, 3, 4, 5, 6, 7, 8),), fuse.StatfsOut, (1, 2, 3, 4, 5, 6, 7, 8)),
        ("xattr_size", (9,), fuse.GetxattrOut, (9,)),
        ("lock", (fuse.FileLock(0, 1 << 63, 1, 2),), fuse.LkOut, (0, 1 << 63, 1, 2)),
        ("lseek", (1 << 40,), fuse.LseekOut, (1 << 40,)),
        ("bmap", (5,), fuse.BmapOut, (5,)),
        ("ioctl", (-1,), fuse.IoctlOut, (-1, 0, 0, 0)),
        ("poll", (5,), fuse.PollOut, (5,)),
    ],
)
def test_a_small_reply(
    session: Session, kernel: Any, encoder: str, arguments: tuple[Any, ...], record: Any, body: tuple[int, ...]
) -> None:
    assert kernel.body(getattr(session, encoder)(4, *arguments), record) == body


def test_an_ioctl_leaves_bytes_behind(session: Session, kernel: Any) -> None:
    reply = session.ioctl(4, 0, b"flags...")
    assert kernel.header(reply)[0] == 32 + 8
    assert reply.endswith(b"flags...")


def test_a_second_answer_raises_and_so_does_one_that_nobody_wants(session: Session) -> None:
    session.empty(4)
    with pytest.raises(RuntimeError, match="request 4 is not in flight"):
        session.error(4, ENOENT)
    with pytest.raises(RuntimeError, match="request 6 is not in flight"):
        session.data_header(6, 0)


@given(st.integers(0, 1 << 70), st.integers(0, 1 << 70))
def test_timeouts_are_split_into_seconds_and_nanoseconds(entry: int, attr: int) -> None:
    valid = validity(entry, attr)
    seconds, attr_seconds, rest, attr_rest = struct_of(fuse.EntryOut).unpack(bytes(16) + valid.entry + bytes(88))[2:6]
    assert (seconds * 10**9 + rest, attr_seconds * 10**9 + attr_rest) == (entry, attr)
    assert unpack_from(fuse.AttrOut, valid.attr + bytes(88))[:2] == (attr_seconds, attr_rest)


@pytest.mark.parametrize("times", [(0, 0), (1_700_000_000_123_456_789, 1), (-1, -1_500_000_000), (-(10**9), 1 << 60)])
def test_attributes_are_those_of_stat_but_for_the_inode_number(tmp_path: Path, times: tuple[int, int]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 5000)
    path.chmod(0o4751)
    os.utime(path, ns=times)
    st_ = path.stat()
    attr = unpack_from(fuse.Attr, attr_of(st_, 1 << 63))
    assert (attr.ino, attr.size, attr.blocks, attr.mode) == (1 << 63, 5000, st_.st_blocks, 0o104751)
    assert (attr.nlink, attr.uid, attr.gid) == (1, st_.st_uid, st_.st_gid)
    assert (attr.rdev, attr.blksize, attr.flags) == (0, st_.st_blksize, 0)
    assert (attr.atime * 10**9 + attr.atimensec, attr.mtime * 10**9 + attr.mtimensec) == times
    assert attr.ctime * 10**9 + attr.ctimensec == st_.st_ctime_ns
    assert unpack_from(fuse.Attr, attr_of(st_, 1, nlink=7, flags=2))[-6:] == (7, *attr[-5:-1], 2)


def test_a_device_has_its_number() -> None:
    attr = unpack_from(fuse.Attr, attr_of(os.stat("/dev/null"), 3))
    assert attr.rdev == 1 << 8 | 3


names = st.binary(min_size=1, max_size=300)
numbers = st.integers(0, (1 << 64) - 1)
entries = st.lists(st.tuples(numbers, numbers, st.integers(0, 15), names, st.booleans()), max_size=40)


@given(entries, st.integers(0, 4096))
def test_a_directory_holds_the_entries_that_fit_in_order(kernel: Any, wanted: list[Any], size: int) -> None:
    session = kernel.session()
    for opcode, plus in (("READDIR", False), ("READDIRPLUS", True)):
        data = kernel.request(opcode, 4)
        session.decode(data, len(data))
        buffer, expected = DirBuffer(size), []
        for ino, cookie, kind, name, bare in wanted:
            length = (128 if plus else 0) + 24 + (len(name) + 7 & ~7)
            before = len(buffer)
            if not plus:
                fits = buffer.add(ino, cookie, kind, name)
                entry: tuple[int, ...] = ()
            elif bare:
                fits = buffer.add_bare(ino, cookie, kind, name)
                entry = (0,) * 22
            else:
                fits = buffer.add_plus(20, 21, VALID, pack(ATTR), ino, cookie, kind, name)
                entry = (20, 21, *TIMES, *ATTR)
            assert fits == (before + length <= size)
            assert len(buffer) == before + length * fits
            if fits:
                expected.append((entry, ino, cookie, kind, name))
        assert kernel.entries(session.directory(4, buffer), plus) == expected


@pytest.mark.parametrize("length", [1, 8, 9, 255])
def test_an_entry_that_fits_to_the_byte_is_taken(length: int) -> None:
    padded = length + 7 & ~7
    for missing in (0, 1):
        assert DirBuffer(24 + padded - missing).add(1, 2, 8, b"n" * length) is (not missing)
        assert DirBuffer(152 + padded - missing).add_bare(1, 2, 8, b"n" * length) is (not missing)
        plus = DirBuffer(152 + padded - missing)
        assert plus.add_plus(20, 21, VALID, pack(ATTR), 1, 2, 8, b"n" * length) is (not missing)


def test_notifications_are_replies_to_nobody_with_a_code_for_an_error(kernel: Any) -> None:
    reply = notify.inval_inode(5, -1, 0)
    assert kernel.header(reply) == (40, fuse.FUSE_NOTIFY_INVAL_INODE, 0)
    assert unpack_from(fuse.NotifyInvalInodeOut, reply, 16) == (5, -1, 0)
    reply = notify.inval_entry(1, b"name", fuse.FUSE_EXPIRE_ONLY)
    assert kernel.header(reply) == (37, fuse.FUSE_NOTIFY_INVAL_ENTRY, 0)
    assert unpack_from(fuse.NotifyInvalEntryOut, reply, 16) == (1, 4, 1)
    assert reply.endswith(b"name\0")
    reply = notify.delete(1, 9, b"name")
    assert kernel.header(reply) == (45, fuse.FUSE_NOTIFY_DELETE, 0)
    assert unpack_from(fuse.NotifyDeleteOut, reply, 16) == (1, 9, 4)
    assert reply.endswith(b"name\0")
