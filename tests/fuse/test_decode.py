"""Requests are decoded to the byte, and what is not as the protocol says is refused."""

from errno import EAGAIN, EIO, ENOSYS, EPROTO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overt.fuse.opcodes import NONE, OPCODES, STEP, TEXT, Opcode
from overt.fuse.request import Refused, Request
from overt.fuse.session import Session
from overt.wire import fuse
from overt.wire.record import struct_of

ROWS = [row for row in OPCODES if row.name != "INIT"]
BITS = {"B": 8, "H": 16, "I": 32, "Q": 64, "i": 32, "q": 64}

components = st.binary(min_size=1, max_size=300).map(lambda name: name.replace(b"\0", b"0").replace(b"/", b"|"))
components = components.filter(lambda name: name not in (b".", b".."))
texts = st.binary(min_size=1, max_size=300).map(lambda name: name.replace(b"\0", b"0"))


def decode(session: Session, data: bytes | bytearray) -> Request:
    """As the server does it: the request stands at the beginning of a larger buffer, with leftovers after it."""
    return session.decode(bytearray(data) + b"leftovers of the last request", len(data))


def refused(session: Session, data: bytes | bytearray) -> Refused:
    before = dict(session.inflight)
    with pytest.raises(Refused) as caught:
        decode(session, data)
    assert session.inflight == before
    return caught.value


def arguments(record: type[tuple[Any, ...]]) -> st.SearchStrategy[tuple[int, ...]]:
    fields = []
    for code in struct_of(record).format:
        if code in BITS:
            half = 1 << BITS[code] - 1
            fields.append(st.integers(-half, half - 1) if code.islower() else st.integers(0, 2 * half - 1))
    return st.tuples(*fields)


@st.composite
def requests(draw: st.DrawFn) -> tuple[Opcode, tuple[int, ...] | None, tuple[bytes, ...], bytes]:
    row = draw(st.sampled_from(ROWS))
    arg = draw(arguments(row.record)) if row.record is not None else None
    names = tuple(draw(texts if kind == TEXT else components) for kind in row.names)
    payload = b""
    if row.payload is not None:
        size = draw(st.integers(row.payload.least, 9000 // row.payload.unit)) * row.payload.unit
        payload = (draw(st.binary(min_size=1, max_size=64)) * size)[:size]
    return row, arg, names, payload


@given(requests(), st.integers(1, (1 << 64) - 1), st.sampled_from([b"", bytes(8), b"x" * 24]))
def test_a_request_that_was_encoded_decodes_to_itself(
    kernel: Any, asked: tuple[Opcode, tuple[int, ...] | None, tuple[bytes, ...], bytes], unique: int, extensions: bytes
) -> None:
    row, arg, names, payload = asked
    session = kernel.session()
    data = kernel.request(row, unique, arg, names, payload, nodeid=77, extensions=extensions)
    got = decode(session, data)
    assert (got.unique, got.opcode, got.nodeid, got.uid, got.gid, got.pid) == (unique, row.number, 77, 1000, 100, 4321)
    assert (got.name, got.name2) == (*names, b"", b"")[:2]
    assert not got.interrupted
    if row.name == "FORGET":
        assert arg is not None
        assert got.arg == ((77, arg[0]),)
    elif row.name == "BATCH_FORGET":
        assert got.arg == tuple(struct_of(fuse.ForgetOne).iter_unpack(payload))
        assert got.payload == b""
    else:
        assert bytes(got.payload) == payload
        expected = list(arg or ())
        if row.payload is not None:
            record: Any = row.record
            expected[record._fields.index(row.payload.field)] = len(payload)
        assert got.arg == tuple(expected)
    assert session.inflight == ({} if row.reply == NONE else {unique: got})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_request_that_is_cut_off_anywhere_or_goes_on_too_long_is_refused(kernel: Any, row: Opcode) -> None:
    session = kernel.session()
    whole = kernel.request(row, 4, None, (b"name", b"other")[: len(row.names)], bytes(16 if row.payload else 0))
    for size in range(len(whole)):
        short = whole[:size]
        assert refused(session, short).errno == EIO  # and the header tells of more
        if size >= 40:
            short[0:4] = size.to_bytes(4, "little")
            error = refused(session, short)
            assert (error.unique, error.errno) == (0 if row.reply == NONE else 4, EIO)
    long = whole + b"x"
    long[0:4] = len(long).to_bytes(4, "little")
    assert refused(session, long).errno == EIO
    decode(session, whole)


@pytest.mark.parametrize("difference", [-1, 1, 8, 1 << 20])
def test_a_request_that_lies_about_its_length_is_refused(kernel: Any, difference: int) -> None:
    session = kernel.session()
    data = kernel.request("LOOKUP", 4, None, (b"name",))
    data[0:4] = (len(data) + difference).to_bytes(4, "little")
    assert (refused(session, data).unique, refused(session, data).errno) == (4, EIO)


def test_less_than_a_header_is_refused_in_silence(kernel: Any) -> None:
    error = refused(kernel.session(), bytes(39))
    assert (error.unique, error.errno, error.reply) == (0, EIO, b"")


def test_a_refusal_is_one_line_in_the_log_and_a_reply(kernel: Any) -> None:
    lines: list[str] = []
    session = kernel.session(lines.append)
    error = refused(session, kernel.request("UNLINK", 8, None, (b"new\nline/",)))
    assert kernel.header(error.reply) == (16, -EIO, 8)
    assert lines == [str(error)] == [r"fuse: refused UNLINK, unique 8: b'new\nline/' is no name"]


@pytest.mark.parametrize("row", [row for row in ROWS if row.names], ids=lambda row: row.name)
def test_a_name_is_not_empty_and_a_component_is_neither_a_path_nor_a_dot(kernel: Any, row: Opcode) -> None:
    session = kernel.session(wanted=fuse.FUSE_SETXATTR_EXT)
    good = [b"good"] * len(row.names)
    for position, kind in enumerate(row.names):
        for bad in (b"", b"a/b", b"/", b".", b".."):
            names = good.copy()
            names[position] = bad
            data = kernel.request(row, 4, None, tuple(names))
            if bad and kind == TEXT:
                decode(session, data)
                session.error(4, EIO)
            else:
                assert (refused(session, data).unique, refused(session, data).errno) == (4, EIO)
    decode(session, kernel.request(row, 4, None, (b"...", b"..a")[: len(row.names)]))


def test_only_lookup_takes_dots_and_only_with_export_support(kernel: Any) -> None:
    session = kernel.session(wanted=fuse.FUSE_EXPORT_SUPPORT)
    for unique, name in ((4, b"."), (6, b"..")):
        assert decode(session, kernel.request("LOOKUP", unique, None, (name,))).name == name
    assert refused(session, kernel.request("LOOKUP", 8, None, (b"../x",))).errno == EIO
    for row in ROWS:
        if row.names and STEP not in row.names and TEXT not in row.names:
            assert refused(session, kernel.request(row, 8, None, (b"..", b"..")[: len(row.names)])).errno == EIO


def test_a_tmpfile_has_a_slash_for_a_name_as_the_kernel_sends_it(kernel: Any) -> None:
    assert decode(kernel.session(), kernel.request("TMPFILE", 4, None, (b"/",))).name == b"/"


def test_extensions_stand_after_everything_else_and_are_left_alone(kernel: Any) -> None:
    session = kernel.session()
    extension = bytes((16, 0, 0, 0, 32, 0, 0, 0, 1, 0, 0, 0, 100, 0, 0, 0))
    made = decode(session, kernel.request("SYMLINK", 4, None, (b"link", b"../target"), extensions=extension))
    assert (made.name, made.name2) == (b"link", b"../target")
    data = kernel.request("GETATTR", 6)
    data[36] = 3  # 24 bytes of 56: they would begin inside the record
    assert refused(session, data).errno == EIO
    data[36:38] = b"\xff\xff"
    assert refused(session, data).errno == EIO


def test_a_payload_is_as_long_as_the_record_says_and_no_longer_than_negotiated(kernel: Any) -> None:
    session = kernel.session(max_write=8192)
    assert session.max_write == 8192
    largest = decode(session, kernel.request("WRITE", 4, None, (), b"d" * 8192))
    assert bytes(largest.payload) == b"d" * 8192
    assert refused(session, kernel.request("WRITE", 6, None, (), b"d" * 8193)).errno == EIO
    data = kernel.request("WRITE", 6, None, (), b"d" * 100)
    data[40 + 16] += 1
    assert refused(session, data).errno == EIO
    assert decode(session, kernel.request("SETXATTR", 8, None, (b"user.x",), b"v" * 65536)).name == b"user.x"
    assert refused(session, kernel.request("SETXATTR", 10, None, (b"user.x",), b"v" * 65537)).errno == EIO
    zeros = decode(session, kernel.request("SETXATTR", 12, None, (b"user.x",), b"\0\0/\0"))
    assert (zeros.name, bytes(zeros.payload)) == (b"user.x", b"\0\0/\0")


def test_a_write_is_a_view_of_the_buffer_until_it_is_kept(kernel: Any) -> None:
    session = kernel.session()
    data = kernel.request("WRITE", 4, None, (), b"old!")
    write = session.decode(data, len(data))
    data[-4:] = b"new!"
    assert write.payload == b"new!"
    write.keep()
    data[-4:] = b"more"
    assert write.payload == b"new!"


def test_forgets_come_as_pairs_and_leave_nothing_in_flight(kernel: Any) -> None:
    session = kernel.session()
    assert decode(session, kernel.request("FORGET", 4, (3,), nodeid=9)).arg == ((9, 3),)
    pairs = struct_of(fuse.ForgetOne, fuse.ForgetOne).pack(5, 1, 6, 2)
    assert decode(session, kernel.request("BATCH_FORGET", 6, None, (), pairs)).arg == ((5, 1), (6, 2))
    assert session.inflight == {}


@pytest.mark.parametrize("count", [0, 1, 3, 0xFFFFFFFF])
def test_a_batch_of_forgets_that_does_not_fit_its_count_is_refused_in_silence(kernel: Any, count: int) -> None:
    data = kernel.request("BATCH_FORGET", 4, None, (), bytes(32))
    data[40:44] = count.to_bytes(4, "little")
    assert refused(kernel.session(), data).reply == b""


def test_an_unknown_opcode_is_answered_with_enosys(kernel: Any) -> None:
    session = kernel.session()
    for number in (0, 7, 19, 48, 49, 54, 63, 64, 4096, 0xFFFFFFFF):
        error = refused(session, kernel.request(Opcode(number, "UNKNOWN"), 4))
        assert (error.unique, error.errno) == (4, ENOSYS)
    assert refused(session, kernel.request(Opcode(fuse.FUSE_NOTIFY_REPLY, "NOTIFY_REPLY"), 4)).reply == b""


def test_an_opcode_newer_than_the_negotiated_version_is_unknown(kernel: Any) -> None:
    session = kernel.session(minor=38)
    decode(session, kernel.request("TMPFILE", 4, None, (b"/",)))
    assert refused(session, kernel.request("STATX", 6)).errno == ENOSYS


def test_the_unique_of_a_request_in_flight_is_not_answered_for_another(kernel: Any) -> None:
    session = kernel.session()
    first = decode(session, kernel.request("GETATTR", 4))
    again = refused(session, kernel.request("UNLINK", 4, None, (b"name",)))
    assert (again.unique, again.errno, again.reply) == (0, EPROTO, b"")
    broken = kernel.request("GETATTR", 4)[:-1]
    assert refused(session, broken).reply == b""
    assert session.inflight == {4: first}


def test_a_unique_of_zero_would_be_a_notification_and_is_not_answered(kernel: Any) -> None:
    assert refused(kernel.session(), kernel.request("GETATTR", 0)).reply == b""


def test_interrupt_marks_its_target_and_wants_no_answer(kernel: Any) -> None:
    session = kernel.session()
    target = decode(session, kernel.request("FSYNC", 4))
    interrupt = decode(session, kernel.request("INTERRUPT", 5, (4,)))
    assert interrupt.arg == (4,)
    assert target.interrupted
    assert session.inflight == {4: target}
    with pytest.raises(RuntimeError):
        session.empty(interrupt.unique)


def test_an_interrupt_of_something_unknown_can_be_sent_back(kernel: Any) -> None:
    session = kernel.session()
    interrupt = decode(session, kernel.request("INTERRUPT", 5, (4,)))
    assert interrupt.arg[0] not in session.inflight
    assert kernel.header(session.requeue(interrupt)) == (16, -EAGAIN, 5)


def test_a_request_says_what_it_is(kernel: Any) -> None:
    got = decode(kernel.session(), kernel.request("RENAME2", 4, (9, 1), (b"old", b"new"), nodeid=3))
    assert repr(got) == "<RENAME2 4 nodeid=3 (9, 1) b'old new'>"
