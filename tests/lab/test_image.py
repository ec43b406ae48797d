"""The image by itself: contents, rules, durability."""

import errno
import os
from collections.abc import Callable

import pytest

from overt.lab.image import CHUNK, MEANING, PAGE, Counters, Image, Rule

SIZE = 4 << 20
MARKER = b"0123456789abcdef"


def contents(image: Image, *, durable: bool = False) -> bytes:
    fd = os.memfd_create("contents")
    try:
        image.dump(fd, durable=durable)
        return os.pread(fd, 2 * SIZE, 0)
    finally:
        os.close(fd)


def rule(what: str, *, code: int = errno.EIO, marker: bytes = b"", start: int = 0, end: int = SIZE) -> Rule:
    return Rule(MEANING[what], code, marker, start, end)


def write(image: Image, start: int, data: bytes) -> None:
    image.write(start, memoryview(data))


def refused(call: Callable[[], object]) -> int | None:
    try:
        call()
    except OSError as error:
        return error.errno
    return None


def test_what_was_written_is_read_and_the_rest_is_zeros() -> None:
    image = Image(SIZE)
    write(image, CHUNK - 512, b"x" * 1024)
    assert bytes(image.read(CHUNK - 1024, 2048)) == bytes(512) + b"x" * 1024 + bytes(512)
    assert contents(image) == bytes(CHUNK - 512) + b"x" * 1024 + bytes(SIZE - CHUNK - 512)


def test_a_read_past_the_end_is_cut_off() -> None:
    assert len(Image(SIZE).read(SIZE - 100, 4096)) == 100


def test_only_a_flush_makes_a_write_durable() -> None:
    image = Image(SIZE)
    write(image, 5000, MARKER)
    assert MARKER in contents(image)
    assert MARKER not in contents(image, durable=True)
    image.flush()
    assert contents(image, durable=True) == contents(image)


def test_a_flush_that_fails_makes_nothing_durable_and_the_next_one_does() -> None:
    image = Image(SIZE)
    write(image, 5000, MARKER)
    image.rules.append(rule("flush"))
    assert refused(image.flush) == errno.EIO
    assert MARKER not in contents(image, durable=True)
    image.rules.clear()
    image.flush()
    assert MARKER in contents(image, durable=True)


def test_an_overwrite_is_not_durable_before_its_own_flush() -> None:
    image = Image(SIZE)
    write(image, 0, b"old" * 100)
    image.flush()
    write(image, 0, b"new" * 100)
    assert contents(image, durable=True).startswith(b"old" * 100)


def test_a_failed_write_leaves_the_old_bytes() -> None:
    image = Image(SIZE)
    write(image, 0, b"old")
    image.rules.append(rule("write", code=errno.ENOSPC))
    assert refused(lambda: write(image, 0, b"new")) == errno.ENOSPC
    assert bytes(image.read(0, 3)) == b"old"


@pytest.mark.parametrize(
    ("start", "size", "fails"), [(0, 4096, False), (4096, 1, True), (0, 4097, True), (8191, 1, True), (8192, 1, False)]
)
def test_a_range_condemns_what_touches_it(start: int, size: int, fails: bool) -> None:
    image = Image(SIZE)
    image.rules.append(rule("write", start=4096, end=8192))
    assert (refused(lambda: write(image, start, b"x" * size)) == errno.EIO) is fails
    assert refused(lambda: image.read(start, size)) is None


def test_a_marker_condemns_the_writes_that_hold_it_wherever_it_stands() -> None:
    image = Image(SIZE)
    image.rules.append(rule("data", marker=MARKER))
    assert refused(lambda: write(image, 0, b"x" * 4095 + MARKER + b"x")) == errno.EIO
    assert refused(lambda: write(image, 0, MARKER[:-1])) is None


@pytest.mark.parametrize("what", MEANING)
def test_each_kind_of_fault_condemns_the_requests_it_means(what: str) -> None:
    image = Image(SIZE)
    image.rules.append(rule(what))
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: image.read(0, 1),
        "write": lambda: write(image, 0, b"x"),
        "flush": image.flush,
        "discard": lambda: image.discard(0, 1),
    }
    assert {name for name, call in calls.items() if refused(call)} == MEANING[what]


@pytest.mark.parametrize(("start", "size"), [(0, SIZE), (1, 3), (PAGE - 1, 2), (100, 3 * PAGE), (PAGE, 2 * PAGE)])
def test_a_discarded_range_reads_as_zeros_and_its_surroundings_stay(start: int, size: int) -> None:
    image = Image(SIZE)
    write(image, 0, b"x" * SIZE)
    image.discard(start, size)
    assert contents(image) == b"x" * start + bytes(size) + b"x" * (SIZE - start - size)


def test_counters_tell_requests_from_failures() -> None:
    image = Image(SIZE)
    write(image, 0, b"four")
    image.flush()
    image.rules.append(rule("all"))
    refused(lambda: write(image, 0, b"lost"))
    refused(image.flush)
    image.read(0, 10)
    assert image.counters() == Counters(
        reads=1, writes=2, flushes=2, failed_writes=1, failed_flushes=1, bytes_read=10, bytes_written=4
    )


def test_an_image_loaded_from_a_file_is_durable_and_keeps_its_holes() -> None:
    first, second = Image(SIZE), Image(SIZE)
    write(first, SIZE - 10, b"the end...")
    fd = os.memfd_create("contents")
    try:
        first.dump(fd, durable=False)
        assert os.fstat(fd).st_blocks * 512 <= CHUNK
        second.load(fd)
    finally:
        os.close(fd)
    assert contents(second, durable=True) == contents(first)
