"""What errseq promises holds between any two instructions of it."""

import itertools
from collections.abc import Sequence

import pytest

from overt.errseq import SEEN, check, sample
from overt.prove.races import Steps, Word, checking, opening, schedules, setting

EIO, ENOSPC = 5, 28
pytestmark = pytest.mark.timeout(60)


def finished(word: Word, *threads: Steps) -> None:
    for thread in threads:
        for _ in thread:
            pass


@pytest.mark.parametrize("errors", [(EIO,), (EIO, EIO), (EIO, ENOSPC)])
@pytest.mark.parametrize("before", [0, EIO, EIO | SEEN])
def test_every_watcher_is_told_and_none_more_often_than_there_were_errors(errors: Sequence[int], before: int) -> None:
    """Two watchers ask while errors are being recorded, and once more when all is over; and then they have peace."""

    def start() -> tuple[Word, list[Steps]]:
        since = sample(before)
        word = Word(before, {"a": since, "b": since}, {"a": 0, "b": 0})
        return word, [*(setting(word, code) for code in errors), checking(word, "a"), checking(word, "b")]

    count = 0
    for word in schedules(start):
        count += 1
        finished(word, checking(word, "a"), checking(word, "b"))
        for watcher in "ab":
            assert 1 <= word.told[watcher] <= len(errors) + (before == EIO)
            assert check(word.value, word.since[watcher]) == 0
    assert count > 10


def test_a_watcher_that_opens_meanwhile_is_told_unless_somebody_was() -> None:
    def start() -> tuple[Word, list[Steps]]:
        word = Word(0, {"a": 0}, {"a": 0})
        return word, [setting(word, EIO), opening(word, "new"), checking(word, "a")]

    for word in schedules(start):
        finished(word, checking(word, "new"), checking(word, "a"))
        assert word.told["a"] == 1
        assert word.told["new"] in (0, 1)
        assert word.told["new"] or word.since["new"] & SEEN


def test_an_error_that_nobody_has_seen_is_still_unseen_afterwards() -> None:
    def start() -> tuple[Word, list[Steps]]:
        word = Word(EIO | SEEN)
        return word, [setting(word, EIO), setting(word, ENOSPC), setting(word, EIO)]

    outcomes = {word.value for word in schedules(start)}
    assert all(sample(value) == 0 and value for value in outcomes)


def test_who_samples_an_unseen_error_without_marking_it_can_miss_the_next() -> None:
    """The tempting wrong way to watch, for which the split of the flag was proposed."""
    word = Word(EIO, {"a": EIO}, {"a": 0})
    finished(word, setting(word, EIO), checking(word, "a"))
    assert word.told["a"] == 0


def test_every_schedule_is_tried_once() -> None:
    """Two threads of two and three steps, the end of each being one: as many as there are ways to mix them."""
    log: list[str] = []

    def steps(name: str, number: int) -> Steps:
        for _ in range(number):
            log.append(name)
            yield
        log.append(name)

    seen = set()
    for _ in schedules(lambda: (log.clear() or Word(), [steps("a", 1), steps("b", 2)])):  # type: ignore[func-returns-value]
        seen.add("".join(log))
    assert seen == {"".join(order) for order in itertools.permutations("aabbb")}
