"""When an upper is believed, state by state; the write is a real one, to a directory that takes it or does not."""

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from overt.upper.health import Health, Verdict

EIO = OSError(errno.EIO, "flush")
NOWHERE = 10**6  # not a descriptor: every write fails with EBADF


@pytest.fixture
def sound(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_a_sound_upper_is_believed_without_a_write() -> None:
    assert Health().judge(None, NOWHERE) == Verdict(None, None, "flush")


def test_in_doubt_a_write_decides(sound: int) -> None:
    health = Health()
    health.doubt()
    assert health.judge(None, sound).failure is None
    assert health.judge(None, NOWHERE).failure is None  # sound again: no write is tried
    health.doubt()
    failure, entry, source = health.judge(None, NOWHERE)
    assert failure is entry is health.failing
    assert (failure and failure.errno, source) == (errno.EBADF, "dead")


def test_an_episode_is_entered_when_it_begins_and_when_it_ends(sound: int) -> None:
    health = Health()
    assert health.judge(EIO, sound) == Verdict(EIO, EIO, "flush")
    assert health.judge(EIO, sound) == Verdict(EIO, None, "flush")
    assert health.judge(None, NOWHERE) == Verdict(EIO, None, "dead")
    assert health.judge(None, sound) == Verdict(None, EIO, "flush")
    assert health.judge(None, sound) == Verdict(None, None, "flush")
    assert health.judge(EIO, sound) == Verdict(EIO, EIO, "flush")


def test_a_single_failure_is_entered_once(sound: int) -> None:
    health = Health()
    assert health.judge(EIO, sound).entry is EIO
    assert health.judge(None, sound) == Verdict(None, None, "flush")


def test_read_only_is_told_as_loss(sound: int) -> None:
    failure, entry, _ = Health().judge(OSError(errno.EROFS, ""), sound)
    assert (failure and failure.errno, entry and entry.errno) == (errno.EIO, errno.EIO)


def test_a_write_that_is_not_allowed_proves_nothing(sound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int) -> None:
        raise PermissionError(errno.EPERM, "")

    monkeypatch.setattr(os, "utime", refuse)
    health = Health()
    health.doubt()
    assert health.judge(None, sound).failure is None
    assert health.judge(EIO, sound).failure is EIO
    assert health.judge(None, sound).failure is EIO  # still failing: nothing has shown that it is over


def test_a_write_for_which_the_process_has_no_descriptor_proves_nothing(sound: int) -> None:
    """It is no error of the upper, which every container would be told."""
    health = Health()
    health.doubt()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        assert health.judge(None, sound) == Verdict(None, None, "dead")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not health.sound
    assert health.judge(None, sound).failure is None
    assert health.sound


@pytest.mark.parametrize("code", [errno.ENFILE, errno.ENOMEM])
def test_a_write_for_which_the_machine_has_no_room_proves_nothing(
    sound: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(code, "")

    health = Health()
    health.doubt()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert health.judge(None, sound).failure is None
    assert not health.sound
