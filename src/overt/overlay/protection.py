"""Files that are immutable or append-only in the overlay (fs/overlayfs/util.c, ovl_check_protattr, ovl_set_protattr).

Files of the upper do not get these two flags themselves: a copy could not be linked then, nor get a mark, nor could
anything be copied up into a directory. A mark says which of them the file has.
"""

import struct

IMMUTABLE = 0x10
APPEND = 0x20
"""as FS_IOC_GETFLAGS has them, and stx_attributes"""
BOTH = IMMUTABLE | APPEND

_LONGEST = 32
_LETTERS = {ord("a"): APPEND, ord("i"): IMMUTABLE}
_FLAGS = struct.Struct("=I")
_X_IMMUTABLE, _X_APPEND = 0x08, 0x10
"""as FS_IOC_FSGETXATTR has them"""


def decode(value: bytes) -> int:
    """The flags that a mark says; none where it is not one that the kernel would write or heed."""
    if len(value) > _LONGEST or not all(letter in _LETTERS for letter in value):
        return 0
    return sum(_LETTERS[letter] for letter in set(value))


def encode(flags: int) -> bytes:
    """The mark for the flags of `flags` that it can say; empty where there are none."""
    return b"a" * bool(flags & APPEND) + b"i" * bool(flags & IMMUTABLE)


def of_words(words: bytes | bytearray, *, extended: bool) -> int:
    """Which of the two are set in what an ioctl carries: a word of flags, or a struct fsxattr (`extended`)."""
    found: int = _FLAGS.unpack_from(words)[0]
    if extended:
        return IMMUTABLE * bool(found & _X_IMMUTABLE) | APPEND * bool(found & _X_APPEND)
    return found & BOTH


def put_in_words(words: bytearray, protection: int, *, extended: bool) -> None:
    """Set the two there as `protection` has them, and leave the rest as it is."""
    found: int = _FLAGS.unpack_from(words)[0]
    if extended:
        found &= ~(_X_IMMUTABLE | _X_APPEND)
        found |= _X_IMMUTABLE * bool(protection & IMMUTABLE) | _X_APPEND * bool(protection & APPEND)
    else:
        found = found & ~BOTH | protection
    _FLAGS.pack_into(words, 0, found)
