"""errseq_t: an error that each of many watchers is told of once (lib/errseq.c, Linux 4.13 and later).

A cursor is one 32-bit word, changed by whoever meets an error and compared by whoever asks:

    bits 0..11   the errno (MAX_ERRNO is 4095)
    bit  12      SEEN: somebody has looked at this value since it was set
    bits 13..31  a counter, moved by `set_error` only if the value was SEEN

The counter moves only when it must, so that errors nobody looks at cost nothing and 19 bits last. What follows from
that, and from a sample of an unseen error being 0:

* A watcher that samples while an error stands unseen will be told of it, although it came before.
* A second error of the same errno while the first is unseen is the same event to everybody.
* Comparing without marking (`check`) does not take the error away from the next one to sample. Sampling without marking
  is the tempting wrong way to watch: nothing would make the next error look different from this one.

The kernel's operations are compare-and-exchange loops on a word in place; here a cursor is a plain value, and each
operation returns the new one. Whoever holds the cursor serialises.
"""

MAX_ERRNO = 4095
SEEN = 1 << 12
COUNTER = 1 << 13
_MASK = 0xFFFFFFFF


def set_error(cursor: int, errno: int) -> int:
    """Record `errno` (1..4095) on `cursor`; return the new value (errseq_set). ValueError for another errno."""
    if not 0 < errno <= MAX_ERRNO:
        raise ValueError(f"errno {errno} is not in 1..{MAX_ERRNO}")
    new = cursor & ~(MAX_ERRNO | SEEN) | errno
    if cursor & SEEN:
        new = new + COUNTER & _MASK
    return new


def sample(cursor: int) -> int:
    """The value from which a new watcher counts: 0 while an error stands unseen, so that it is told (errseq_sample)."""
    return cursor if cursor & SEEN else 0


def check(cursor: int, since: int) -> int:
    """The errno that a watcher who counts from `since` has not been told of, or 0; marks nothing (errseq_check)."""
    return 0 if cursor == since else cursor & MAX_ERRNO


def check_and_advance(cursor: int, since: int) -> tuple[int, int, int]:
    """Tell a watcher: return (errno or 0, the new cursor, the watcher's new position) (errseq_check_and_advance)."""
    if cursor == since:
        return 0, cursor, since
    seen = cursor | SEEN
    return seen & MAX_ERRNO, seen, seen
