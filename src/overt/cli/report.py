"""What a command says when something went wrong: one line; and where. Without click, for those who do not need it."""

import functools
import os
import sys
from collections.abc import Callable, Sequence

INTERRUPTED = 130
"""the exit status of a command that Ctrl-C has ended, as a shell has it"""


def interruptible(run: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """`run`, which returns an exit status, with one for an interrupt, too: that is no bug, and has no traceback."""

    @functools.wraps(run)
    def until_interrupted(args: Sequence[str]) -> int:
        try:
            return run(args)
        except KeyboardInterrupt:
            return INTERRUPTED

    return until_interrupted


def hold_standard_descriptors() -> None:
    """Put /dev/null in the place of standard input, output and error where a caller has closed them (`>&-`).

    To be called before anything is opened. The first free numbers would go to descriptors of ours else, which
    everybody takes for the terminal: a server puts /dev/null over them.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    # Python has seen them closed, and has nothing in the place of its streams.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", errors="backslashreplace"))


def complain(who: str, what: str) -> None:
    """Print one line on stderr; WHAT may have been laid out on several."""
    print(f"{who}: {' '.join(what.split())}", file=sys.stderr)


def describe(error: OSError) -> str:
    """``strerror: filename``, or what the error says of itself where it carries neither."""
    if error.strerror is None:
        return str(error) or type(error).__name__
    # A filename that is an int is a descriptor's number, which says nothing to the reader.
    names = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)]
    return ": ".join([error.strerror, " -> ".join(map(os.fsdecode, names))] if names else [error.strerror])
