"""errseq between two instructions: every interleaving of those who record an error and those who are told of it.

Elsewhere in the model an operation on a cursor is one step. In the kernel it is a read and a compare-and-exchange, and
others come in between. Here each operation is a generator that stops before every access to the shared word, so that a
schedule, which says whose turn it is, decides what happens; and all schedules are tried.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

from overt.errseq import MAX_ERRNO, SEEN, set_error

Steps = Generator[None, None, None]


@dataclass
class Word:
    """A shared cursor, and what came of those who used it."""

    value: int = 0
    since: dict[str, int] = field(default_factory=dict)
    """where each watcher is"""
    told: dict[str, int] = field(default_factory=dict)
    """how often each was told"""

    def exchange(self, old: int, new: int) -> int:
        """cmpxchg: put `new` in the place of `old`; what was there."""
        found = self.value
        if found == old:
            self.value = new
        return found


def setting(word: Word, errno: int) -> Steps:
    """errseq_set (lib/errseq.c)."""
    yield
    old = word.value
    while True:
        new = set_error(old, errno)
        if new == old:
            return
        yield
        found = word.exchange(old, new)
        if found in (old, new):
            return
        old = found


def checking(word: Word, who: str) -> Steps:
    """errseq_check_and_advance. The caller holds the file's f_lock, so that nobody else moves this watcher."""
    yield
    old = word.value
    if old == word.since[who]:
        return
    new = old | SEEN
    if new != old:
        yield
        word.exchange(old, new)  # if that fails, somebody else has moved it, and the next check will see
    word.since[who] = new
    word.told[who] += bool(new & MAX_ERRNO)


def opening(word: Word, who: str) -> Steps:
    """errseq_sample, for a new watcher."""
    yield
    word.told[who] = 0
    word.since[who] = word.value if word.value & SEEN else 0


def schedules(start: Callable[[], tuple[Word, Sequence[Steps]]]) -> Iterator[Word]:
    """The outcome of every schedule of what `start` makes: a word, and who does something to it at the same time."""
    prefixes: list[list[int]] = [[]]
    while prefixes:
        prefix = prefixes.pop()
        word, threads = start()
        running = dict(enumerate(threads))
        taken: list[int] = []
        while running:
            turn = prefix[len(taken)] if len(taken) < len(prefix) else min(running)
            if len(taken) >= len(prefix):
                prefixes += [[*taken, other] for other in running if other != turn]
            taken.append(turn)
            if next(running[turn], running) is running:
                del running[turn]
        yield word
