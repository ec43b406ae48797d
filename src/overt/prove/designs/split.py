"""errseq with its flag split in two, as Jeff Layton proposed: being told is one thing, having to move the counter
another.

    bit 12   SEEN: reported to user space
    bit 13   MUSTINC: the counter has to move with the next error, because somebody counts from this value

So a watcher can sample (`peek`) without taking the error away from the next one to open the file.
"""

from overt.errseq import MAX_ERRNO, SEEN

MUSTINC = 1 << 13
COUNTER = 1 << 14
_FLAGS = SEEN | MUSTINC


def set_error(cursor: int, errno: int) -> int:
    """errseq_set: the counter moves if anybody counts from the old value."""
    new = cursor & ~(MAX_ERRNO | _FLAGS) | errno
    return new + COUNTER if cursor & MUSTINC else new


def sample(cursor: int) -> int:
    """errseq_sample: 0 while nobody was told."""
    return cursor if cursor & SEEN else 0


def peek(cursor: int) -> tuple[int, int]:
    """errseq_peek: (the new cursor, a position to count from); nobody is taken for told."""
    if cursor == 0:
        return 0, 0
    return cursor | MUSTINC, cursor | MUSTINC


def check(cursor: int, since: int) -> int:
    """errseq_check: whatever the flags say."""
    return 0 if cursor & ~_FLAGS == since & ~_FLAGS else cursor & MAX_ERRNO


def check_and_advance(cursor: int, since: int) -> tuple[int, int, int]:
    """errseq_check_and_advance: told, and so both flags."""
    if check(cursor, since) == 0:
        return 0, cursor, since
    seen = cursor | _FLAGS
    return seen & MAX_ERRNO, seen, seen
