"""The loop changes hands, and what may be lacking then."""

import os
import threading
from collections.abc import Callable, Iterator

import pytest

from overt.guard.loop import Loop

pytestmark = pytest.mark.timeout(30)


class Kept:
    """A loop whose leader is at something that takes long, until `back` is set."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.back = threading.Event()
        self.at_it = threading.Event()
        self.answered = threading.Semaphore(0)
        self._pipes = [os.pipe() for _ in range(2)]
        self._watch(0, lambda: self.loop.long(self._take_long))
        self._watch(1, self.answered.release)
        self._thread = threading.Thread(target=self.loop.run, args=(0.05, lambda: None), daemon=True)
        self._thread.start()

    def _watch(self, which: int, act: Callable[[], object]) -> None:
        def ready(_: int) -> None:
            os.read(self._pipes[which][0], 1)
            act()

        self.loop.watch(self._pipes[which][0], ready)

    def _take_long(self) -> None:
        self.at_it.set()
        self.back.wait()

    def keep_leader(self) -> None:
        os.write(self._pipes[0][1], b"x")
        assert self.at_it.wait(5)

    def answers(self) -> bool:
        os.write(self._pipes[1][1], b"x")
        return self.answered.acquire(timeout=5)

    def close(self) -> None:
        self.back.set()
        self.loop.stop()
        self._thread.join(5)
        for pipe in self._pipes:
            for fd in pipe:
                os.close(fd)


@pytest.fixture
def kept() -> Iterator[Kept]:
    made = Kept()
    yield made
    made.close()


@pytest.mark.parametrize("first", ["the leader comes back", "there are threads again"])
def test_somebody_leads_when_a_leader_is_kept_and_there_can_be_no_deputy(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    refused = threading.Semaphore(0)

    def start(_: threading.Thread) -> None:
        refused.release()
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", start)
        kept.keep_leader()
        assert refused.acquire(timeout=5)
        if first == "the leader comes back":
            kept.back.set()
            assert kept.answers()
    assert kept.answers(), "nobody leads"
