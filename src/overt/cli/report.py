"""What a command says when something went wrong: one line; and where. Without click, for those who do not need it."""

import functools
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from overt.printable import printable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

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


class OutputError(OSError):
    """Standard output failed. EPIPE: nobody reads it any more."""


class _Output(io.FileIO):
    """Standard output, whose errors are told from others."""

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from None


def hold_standard_descriptors() -> None:
    """Put /dev/null in the place of standard input, output and error where a caller has closed them (`>&-`).

    Standard output raises `OutputError` from then on.

    To be called before anything is opened. The first free numbers would go to descriptors of ours else, which
    everybody takes for the terminal: a server puts /dev/null over them.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    # Python has seen them closed, and has nothing in the place of its streams.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", errors="backslashreplace", closefd=False))
    out = sys.stdout
    buffer = io.BufferedWriter(_Output(out.fileno(), "w", closefd=False))
    sys.stdout = io.TextIOWrapper(buffer, out.encoding, out.errors, line_buffering=bool(out.line_buffering))


def complain(who: str, what: str) -> None:
    """Print one line on stderr; WHAT may have been laid out on several, and name what others have named."""
    print(printable(f"{who}: {' '.join(what.split())}"), file=sys.stderr)


def describe(error: OSError) -> str:
    """``strerror: filename``, or what the error says of itself where it carries neither."""
    if isinstance(error, OutputError):
        return f"standard output: {error.strerror}"
    if error.strerror is None:
        return str(error) or type(error).__name__
    # A filename that is an int is a descriptor's number, which says nothing to the reader.
    names = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)]
    return ": ".join([error.strerror, " -> ".join(map(os.fsdecode, names))] if names else [error.strerror])
