"""Work done in a child, with a deadline."""

import errno
import os
import signal
import time

import pytest

from overt.lab.bounded import in_child, run


def fail_with_enoent() -> None:
    os.open("/nowhere", os.O_RDONLY)


def test_the_childs_error_is_raised_here_with_its_words() -> None:
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        in_child(fail_with_enoent, 5)


def test_work_that_succeeds_raises_nothing() -> None:
    in_child(lambda: None, 5)


def test_a_child_that_is_killed_is_an_error() -> None:
    with pytest.raises(OSError, match="status -9"):
        in_child(lambda: os.kill(os.getpid(), signal.SIGKILL), 5)


def test_the_deadline_holds() -> None:
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        in_child(lambda: time.sleep(30), 0.1)
    assert time.monotonic() - begin < 5
    os.wait()


def test_a_rescue_gives_the_child_as_long_again() -> None:
    reading, writing = os.pipe()
    try:
        in_child(lambda: assert_read(reading), 0.2, rescue=lambda: assert_written(writing))
    finally:
        os.close(reading)
        os.close(writing)


def assert_read(fd: int) -> None:
    assert os.read(fd, 1) == b"x"


def assert_written(fd: int) -> None:
    assert os.write(fd, b"x") == 1


def test_a_program_that_fails_is_quoted() -> None:
    with pytest.raises(OSError, match=r"ls /nowhere: .*No such file") as caught:
        run(["/bin/ls", "/nowhere"], 5)
    assert caught.value.errno == errno.EIO
