"""The cursor, against a word-for-word reading of lib/errseq.c with C's arithmetic, and its properties."""

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overt import errseq

EIO, ENOSPC = 5, 28
ERRNOS = st.integers(1, errseq.MAX_ERRNO)
WORDS = st.integers(0, 2**32 - 1)


class Word:
    """errseq_t as the kernel keeps it: a u32 in place, operations on a pointer to it, negative errnos."""

    def __init__(self, value: int = 0) -> None:
        self.word = ctypes.c_uint32(value)

    def set(self, err: int) -> None:
        old = self.word.value
        new = ctypes.c_uint32((old & ~0x1FFF) | -err)
        if old & 0x1000:
            new.value += 0x2000
        self.word = new

    def sample(self) -> int:
        return self.word.value if self.word.value & 0x1000 else 0

    def check(self, since: int) -> int:
        return 0 if self.word.value == since else -(self.word.value & 0xFFF)

    def check_and_advance(self, since: ctypes.c_uint32) -> int:
        old = self.word.value
        if old == since.value:
            return 0
        self.word.value |= 0x1000
        since.value = self.word.value
        return -(since.value & 0xFFF)


@given(WORDS, WORDS, ERRNOS)
def test_every_operation_on_every_word_is_the_kernels(value: int, since: int, errno: int) -> None:
    kernel = Word(value)
    assert errseq.sample(value) == kernel.sample()
    assert errseq.check(value, since) == -kernel.check(since)
    position = ctypes.c_uint32(since)
    told = -kernel.check_and_advance(position)
    assert errseq.check_and_advance(value, since) == (told, kernel.word.value, position.value)
    kernel = Word(value)
    kernel.set(-errno)
    assert errseq.set_error(value, errno) == kernel.word.value


@pytest.mark.parametrize("errno", [0, -EIO, errseq.MAX_ERRNO + 1])
def test_an_errno_that_does_not_fit_is_refused(errno: int) -> None:
    with pytest.raises(ValueError, match=str(errno)):
        errseq.set_error(0, errno)


def test_the_counter_wraps_and_stays_32_bits_wide() -> None:
    last = 0xFFFFE000 | errseq.SEEN | EIO
    assert errseq.set_error(last, ENOSPC) == ENOSPC


@given(WORDS, ERRNOS)
def test_a_watcher_is_told_of_an_error_once(cursor: int, errno: int) -> None:
    _, cursor, since = errseq.check_and_advance(cursor, errseq.sample(cursor))
    cursor = errseq.set_error(cursor, errno)
    told, cursor, since = errseq.check_and_advance(cursor, since)
    assert told == errno
    assert errseq.check_and_advance(cursor, since) == (0, cursor, since)


@given(WORDS, ERRNOS, ERRNOS)
def test_an_error_after_one_that_was_told_is_told_again(cursor: int, first: int, second: int) -> None:
    cursor = errseq.set_error(cursor, first)
    _, cursor, since = errseq.check_and_advance(cursor, errseq.sample(cursor))
    cursor = errseq.set_error(cursor, second)
    assert errseq.check_and_advance(cursor, since)[0] == second


@given(WORDS, ERRNOS)
def test_who_samples_an_unseen_error_is_told_of_it_and_who_samples_a_seen_one_is_not(cursor: int, errno: int) -> None:
    cursor = errseq.set_error(cursor, errno)
    early = errseq.sample(cursor)
    told, cursor, _ = errseq.check_and_advance(cursor, early)
    assert told == errno
    assert errseq.check(cursor, errseq.sample(cursor)) == 0


@given(WORDS, ERRNOS)
def test_an_unseen_error_and_its_like_are_one_event(cursor: int, errno: int) -> None:
    cursor = errseq.set_error(cursor, errno)
    assert errseq.set_error(cursor, errno) == cursor


@given(WORDS, WORDS)
def test_check_marks_nothing(cursor: int, since: int) -> None:
    told = errseq.check(cursor, since)
    assert errseq.check_and_advance(cursor, since)[0] == told


def test_sampling_without_marking_is_the_wrong_way_to_watch() -> None:
    """Jeff Layton's point: who peeks at an unseen error cannot tell the next of the same errno from it."""
    cursor = errseq.set_error(0, EIO)
    peeked = cursor
    assert errseq.check(errseq.set_error(cursor, EIO), peeked) == 0
