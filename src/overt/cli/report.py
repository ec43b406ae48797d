"""What a command says when something went wrong: one line. Without click, for those who do not need it."""

import os
import sys


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
