"""INIT: what is negotiated, and with whom not."""

from errno import EIO, EPROTO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overt.fuse.request import Refused
from overt.fuse.session import Session
from overt.wire import fuse
from overt.wire.record import unpack_from

FLAGS = st.integers(0, (1 << 64) - 1)


def ask(kernel: Any, session: Session, arg: tuple[int, ...], **how: Any) -> fuse.InitOut:
    data = kernel.request("INIT", 2, arg, **how)
    reply = session.init(session.decode(data, len(data)))
    assert kernel.header(reply) == (80, 0, 2)
    assert session.inflight == {}
    return unpack_from(fuse.InitOut, reply, 16)


@given(FLAGS, FLAGS, st.integers(31, 60), st.integers(4096, 1 << 30))
def test_what_is_granted_was_wanted_and_offered(
    kernel: Any, wanted: int, offered: int, minor: int, max_write: int
) -> None:
    session = Session(wanted, max_write, lambda line: None, page_size=4096)
    out = ask(kernel, session, (7, minor, 1 << 17, offered & 0xFFFFFFFF, offered >> 32))
    granted = out.flags | out.flags2 << 32
    assert granted == session.flags
    own = fuse.FUSE_INIT_EXT | fuse.FUSE_MAX_PAGES | fuse.FUSE_BIG_WRITES
    allowed = (wanted | own) & offered
    if not offered & fuse.FUSE_INIT_EXT:
        allowed &= 0xFFFFFFFF
    if allowed & fuse.FUSE_PASSTHROUGH:
        allowed &= ~fuse.FUSE_WRITEBACK_CACHE
    assert granted == allowed
    assert (out.major, out.minor, out.max_readahead, out.time_gran) == (7, min(minor, 46), 1 << 17, 1)
    assert session.minor == out.minor
    assert out.max_stack_depth == session.max_stack_depth == bool(granted & fuse.FUSE_PASSTHROUGH)
    assert out.max_write == session.max_write <= max_write
    assert out.max_pages * 4096 >= out.max_write
    assert out.max_pages == session.max_pages <= (65535 if granted & fuse.FUSE_MAX_PAGES else 32)
    assert session.buffer_size >= max(8192, 80 + session.max_write)
    assert out.map_alignment == 0


def test_passthrough_and_the_writeback_cache_exclude_each_other(kernel: Any) -> None:
    both = fuse.FUSE_PASSTHROUGH | fuse.FUSE_WRITEBACK_CACHE
    new = kernel.session(wanted=both)
    assert new.flags & both == fuse.FUSE_PASSTHROUGH
    old = kernel.session(wanted=both, offered=fuse.FUSE_WRITEBACK_CACHE)
    assert old.flags & both == fuse.FUSE_WRITEBACK_CACHE


@pytest.mark.parametrize(("major", "minor"), [(7, 30), (7, 0), (6, 46), (0, 0)])
def test_a_kernel_that_is_too_old_is_told_eproto_and_the_log_says_which_it_is(
    kernel: Any, major: int, minor: int
) -> None:
    lines: list[str] = []
    session = Session(0, 4096, lines.append)
    data = kernel.request("INIT", 2, (major, minor, 0, 0, 0))
    with pytest.raises(Refused) as caught:
        session.init(session.decode(data, len(data)))
    assert kernel.header(caught.value.reply) == (16, -EPROTO, 2)
    assert lines == [f"fuse: refused INIT, unique 2: the kernel speaks FUSE {major}.{minor}, at least 7.31 is needed"]
    assert not session.ready
    assert session.inflight == {}


def test_a_kernel_with_a_newer_major_version_is_told_ours_and_asks_again(kernel: Any) -> None:
    session = Session(fuse.FUSE_EXPORT_SUPPORT, 4096, lambda line: None)
    out = ask(kernel, session, (8, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF))
    assert (out.major, out.minor, out.flags) == (7, 46, 0)
    assert not session.ready
    out = ask(kernel, session, (7, 46, 0, 0xFFFFFFFF, 0xFFFFFFFF))
    assert session.ready
    assert out.flags & fuse.FUSE_EXPORT_SUPPORT


def test_a_kernel_before_7_36_sends_a_short_init_and_one_after_7_46_may_send_a_longer_one(kernel: Any) -> None:
    session = Session((1 << 64) - 1, 4096, lambda line: None)
    out = ask(kernel, session, (7, 31, 0, 0xFFFF), record=fuse.InitInCompat)
    assert (out.flags, out.flags2) == (0xFFFF, 0)
    session = Session((1 << 64) - 1, 4096, lambda line: None)
    out = ask(kernel, session, (7, 60, 0, 0xFFFFFFFF, 0xFFFFFFFF), payload=bytes(64))
    assert out.minor == 46


def test_nothing_is_served_before_init_and_init_is_served_once(kernel: Any) -> None:
    session = Session(0, 4096, lambda line: None)
    early = kernel.request("GETATTR", 2)
    with pytest.raises(Refused) as caught:
        session.decode(early, len(early))
    assert (caught.value.unique, caught.value.errno) == (2, EPROTO)
    short = kernel.request("INIT", 2, (7, 46, 0, 0), record=fuse.InitInCompat)[:-1]
    short[0] -= 1
    with pytest.raises(Refused) as caught:
        session.decode(short, len(short))
    assert (caught.value.unique, caught.value.errno) == (2, EIO)
    ask(kernel, session, (7, 46, 0, 0, 0))
    again = kernel.request("INIT", 4, (7, 46, 0, 0, 0))
    with pytest.raises(Refused) as caught:
        session.decode(again, len(again))
    assert (caught.value.unique, caught.value.errno) == (4, EPROTO)


def test_a_setxattr_is_short_unless_the_long_one_was_negotiated(kernel: Any) -> None:
    short = kernel.session(wanted=0)
    data = kernel.request("SETXATTR", 4, (0, 2), (b"user.x",), b"v", record=fuse.SetxattrInCompat)
    got = short.decode(data, len(data))
    assert (got.arg, got.name, bytes(got.payload)) == ((1, 2), b"user.x", b"v")
    long = kernel.session(wanted=fuse.FUSE_SETXATTR_EXT)
    data = kernel.request("SETXATTR", 4, (0, 2, 1), (b"user.x",), b"v")
    assert long.decode(data, len(data)).arg == (1, 2, 1)


def test_a_request_timeout_is_asked_for_only_where_it_is_known(kernel: Any) -> None:
    for wanted in (0, fuse.FUSE_REQUEST_TIMEOUT):
        session = Session(wanted, 4096, lambda line: None, request_timeout=60)
        out = ask(kernel, session, (7, 46, 0, 0xFFFFFFFF, 0xFFFFFFFF))
        assert out.request_timeout == session.request_timeout == (60 if wanted else 0)


def test_a_write_that_is_smaller_than_the_kernels_least_is_no_limit() -> None:
    with pytest.raises(ValueError, match="4096"):
        Session(0, 4095, lambda line: None)
