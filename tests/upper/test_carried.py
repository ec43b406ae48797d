"""What one process has taken out of the tracepoint's buffer is not lost if it dies before that is on record."""

import os
from collections.abc import Callable, Iterator

import pytest

from overt.upper.trace import Events, Trace, Watch

from .stage import Stage

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]


@pytest.fixture
def trace() -> Iterator[Trace]:
    made = Trace()
    yield made
    made.close()


def in_a_child(work: Callable[[], bool]) -> bool:
    """Whether `work` said yes in a process that then ends at once."""
    pid = os.fork()
    if pid == 0:
        answer = False
        try:
            answer = work()
        finally:
            os._exit(not answer)
    return os.waitpid(pid, 0)[1] == 0


def test_events_that_a_dead_process_took_are_found_by_the_next_until_they_are_kept(ext4: Stage, trace: Trace) -> None:
    s_dev = os.stat(ext4.disk.path).st_dev

    def watch() -> Watch:
        trace.expect([s_dev])
        return trace.watch(s_dev)

    def takes(events: bool, *, lost: bool = False, keeps: bool = False) -> Callable[[], bool]:
        def work() -> bool:
            found: Events = watch().take()
            if keeps:
                trace.kept(s_dev, trace.taken(s_dev))
            return (bool(found), found.lost) == (events, lost)

        return work

    def lose() -> bool:
        ours = watch()
        ext4.lose("victim")
        return not ours.inodes

    assert in_a_child(takes(False))
    assert in_a_child(lose)
    assert in_a_child(takes(True))
    assert in_a_child(takes(True, lost=True))  # not kept by that one
    assert in_a_child(takes(True, lost=True, keeps=True))
    assert in_a_child(takes(False))


def test_what_a_dead_process_has_read_and_not_handed_out_is_read_by_the_next(ext4: Stage, trace: Trace) -> None:
    s_dev = os.stat(ext4.disk.path).st_dev

    def dies() -> bool:
        trace.expect([s_dev])
        number = ext4.lose("victim")
        count = os.readv(trace._pipe, [memoryview(trace._memory)[:1000]])
        return count > 0 and number > 0

    def next_one() -> bool:
        trace.expect([s_dev])
        found = trace.watch(s_dev).take()
        return len(found.inodes) == 1 and not found.lost

    assert in_a_child(dies)
    assert in_a_child(next_one)


def test_what_a_process_that_died_had_not_cleared_yet_is_not_read_again(ext4: Stage, trace: Trace) -> None:
    s_dev = os.stat(ext4.disk.path).st_dev
    device = f"{os.major(s_dev)}:{os.minor(s_dev)}"

    def dies() -> bool:
        """While it clears what it has handed out: the beginning is zero, the rest is not."""
        old = f" 1.0: filemap_set_wb_err: dev={device} ino=0x4d2\n".encode() * 20
        trace._memory[: len(old)] = bytes(4) + old[4:]
        return True

    def reads_and_dies() -> bool:
        trace.expect([s_dev])
        ext4.lose("victim")
        room = memoryview(trace._memory)
        return os.readv(trace._pipe, [room[:1000]]) > 0

    def next_one() -> bool:
        trace.expect([s_dev])
        inodes = trace.watch(s_dev).take().inodes
        return len(inodes) == 1 and 0x4D2 not in inodes

    assert in_a_child(dies)
    assert in_a_child(reads_and_dies)
    assert in_a_child(next_one)
