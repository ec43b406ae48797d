"""Threads for work that blocks, where there can be no more of them."""

import errno
import threading
from collections.abc import Iterator

import pytest

from overt.server.pool import Pool

SECONDS = 10.0


class Machine:
    """What there can be threads on, or not."""

    full = False


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if made.full:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    return made


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool(8, "test")
    yield made
    made.close()


class Work:
    """It takes until it is ended."""

    def __init__(self) -> None:
        self.begun, self.ended, self.done = threading.Event(), threading.Event(), threading.Event()
        self.thread = 0

    def __call__(self) -> None:
        self.thread = threading.get_ident()
        self.begun.set()
        self.ended.wait(SECONDS)
        self.done.set()

    def end(self) -> None:
        self.ended.set()
        assert self.done.wait(SECONDS)


def test_without_any_thread_work_is_refused_and_not_done_later(machine: Machine, pool: Pool) -> None:
    refused, other = Work(), Work()
    machine.full = True
    with pytest.raises(OSError, match="new thread") as raised:
        pool.submit(refused)
    assert raised.value.errno == errno.EAGAIN
    machine.full = False
    pool.submit(other)
    assert other.begun.wait(SECONDS)
    other.end()
    third = Work()
    pool.submit(third)
    assert third.begun.wait(SECONDS)
    third.end()
    assert not refused.begun.is_set()


def test_without_any_thread_work_that_must_be_done_is_done_by_who_asks(machine: Machine, pool: Pool) -> None:
    work = Work()
    work.ended.set()
    machine.full = True
    pool.see_to(work)
    assert work.thread == threading.get_ident()


def test_without_one_more_thread_work_waits_for_one_that_is_there(machine: Machine, pool: Pool) -> None:
    first, second = Work(), Work()
    pool.submit(first)
    machine.full = True
    pool.submit(second)
    assert first.begun.wait(SECONDS)
    assert (pool.short, second.begun.wait(0.1)) == (True, False)
    first.end()
    assert second.begun.wait(SECONDS)
    assert not pool.short
    second.end()


def test_a_thread_that_could_not_be_started_is_not_counted_on(machine: Machine, pool: Pool) -> None:
    """The one that took over what waits for it is busy: whoever comes next has one started."""
    works = [Work() for _ in range(3)]
    pool.submit(works[0])
    machine.full = True
    pool.submit(works[1])
    works[0].end()
    assert works[1].begun.wait(SECONDS)
    machine.full = False
    pool.submit(works[2])
    assert works[2].begun.wait(SECONDS)
    for work in works[1:]:
        work.end()


def test_what_waits_gets_a_thread_when_there_can_be_one_again(machine: Machine, pool: Pool) -> None:
    first, second = Work(), Work()
    pool.submit(first)
    machine.full = True
    pool.submit(second)
    pool.replenish()
    assert not second.begun.is_set()
    machine.full = False
    pool.replenish()
    assert second.begun.wait(SECONDS)
    for work in (first, second):
        work.end()
