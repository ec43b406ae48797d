"""Who is gathered for one flush, and for how long."""

import errno
import threading
import time

import pytest

from overt.guard.crowd import Crowd
from overt.upper.flusher import Done

pytestmark = pytest.mark.timeout(60)

NO_FLUSHER = "the flusher was closed"


class Flushes:
    """A flush that takes no time; or cannot be asked for."""

    def __init__(self, refusal: str = "") -> None:
        self.crowd = Crowd()
        self.refusal = refusal
        self.waits: dict[int, float] = {}
        self.answers: dict[int, OSError | None] = {}
        self.flushes = 0
        self._changed = threading.Condition()

    def flush(self, *done: Done) -> None:
        if self.refusal:
            raise RuntimeError(self.refusal)
        self.flushes += 1
        for each in done:
            each(None)

    def call(self, listener: int) -> bool:
        """Whether it was gathered."""
        begun = time.monotonic()

        def done(failure: OSError | None) -> None:
            with self._changed:
                self.waits[listener] = time.monotonic() - begun
                self.answers[listener] = failure
                self._changed.notify_all()

        return self.crowd.gather(listener, done, self.flush)

    def wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.waits) >= count, 10), "somebody was forgotten"


def test_a_crowd_shares_a_flush() -> None:
    made = Flushes()
    gathered = [made.call(listener) for listener in range(1000)]
    made.wait(sum(gathered))
    assert gathered == [False] * 2 + [True] * 998
    assert made.flushes == 1


def test_all_are_answered_if_there_is_no_flush() -> None:
    made = Flushes(NO_FLUSHER)
    gathered = [made.call(listener) for listener in range(5)]
    made.wait(3)
    assert gathered == [False, False, True, True, True]
    assert [(failure and failure.errno) for failure in made.answers.values()] == [errno.EIO] * 3
    made.refusal = ""
    later = [made.call(listener) for listener in range(100, 110)]
    made.wait(3 + sum(later))
    assert made.flushes >= 1


def test_those_who_come_later_do_not_prolong_the_wait() -> None:
    made = Flushes()
    for listener in range(3):
        made.call(listener)
    for listener in range(100, 200):
        time.sleep(0.002)
        made.call(listener)
    made.wait(1)
    assert made.waits[2] < 0.1


def test_who_calls_again_waits_for_nobody() -> None:
    made = Flushes()
    assert not made.call(0)
    for listener in range(1, 200):
        made.call(listener)
    assert not made.call(0)
    made.wait(198)
    assert not any(made.call(listener) for listener in range(200))
