"""The index: how a lower file with several names stays one file when it is copied up (fs/overlayfs/namei.c, util.c).

The copy gets an *entry* in ``index``, beside ``work`` in the work directory: a link to it whose name is the file handle
of the lower file, in hexadecimal. By it every name that the lower file has leads to the copy, also one that the upper
does not have. How many links all of these are, the *union*, cannot be counted, so it is kept in an xattr: as a
difference to the links of the upper file (``U+1``, the entry counted among them) or, while one is being made of which
nobody knows whether it will be there after a crash, to those of the lower file (``L-1``).
"""

import re

TEMPORARY = b"#"
"""how the name of something begins that a mount has left in the index unfinished"""
_LINKS = re.compile(rb"([UL])([+-][0-9]{1,9})")
_HEAD = 21
"""bytes of the shortest handle: struct ovl_fb"""


def entry_of(handle: bytes) -> bytes:
    """The name of the entry for a lower file with this handle (the value of its copy's origin mark)."""
    return handle.hex().encode()


def handle_of(entry: bytes) -> bytes:
    """The handle that an entry is named by; ValueError for a name that is none."""
    handle = bytes.fromhex(entry.decode("ascii"))
    if len(handle) < _HEAD or entry_of(handle) != entry.lower():
        raise ValueError(entry)
    return handle


def beside_upper(difference: int) -> bytes:
    """The value of the xattr: the union has so many links more than the upper file."""
    return b"U%+d" % difference


def beside_lower(difference: int) -> bytes:
    """The same, more than the lower file."""
    return b"L%+d" % difference


def union(value: bytes | None, lower: int, upper: int) -> int | None:
    """How many links a file has that has `lower` and `upper` ones in its layers; None where that is not known."""
    match = _LINKS.fullmatch(value or b"")
    if match is None or lower == 1:
        return None
    links = int(match[2]) + (lower if match[1] == b"L" else upper)
    return links if links > 0 else None
