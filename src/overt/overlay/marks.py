"""The marks that overlayfs leaves in a layer: whiteouts, opaque directories, private xattrs (fs/overlayfs/util.c)."""

import stat

PREFIX = b"trusted.overlay."
USER_PREFIX = b"user.overlay."

OPAQUE = b"opaque"
WHITEOUT = b"whiteout"

REDIRECT = b"redirect"
"""A directory or a file without its data that was renamed: its lower part is to be found under another name."""
ORIGIN = b"origin"
"""A copy: the file handle of what it was copied from."""
IMPURE = b"impure"
"""A directory in which there are copies, whose inode numbers are not their own; its value is ``y``."""
METACOPY = b"metacopy"
"""A file that was copied up without its data (metacopy=on): what it holds itself is a hole."""
NLINK = b"nlink"
"""A file in the index: how many links it has with those that only lower layers have (overt.overlay.index)."""
PROTATTR = b"protattr"
"""A file that is immutable or append-only in the overlay (overt.overlay.protection)."""
UPPER = b"upper"
"""The index: the file handle of the upper's root that it belongs to."""

OPAQUE_YES = b"y"
OPAQUE_WITH_XATTR_WHITEOUTS = b"x"
"""The directory hides nothing, but regular empty files in it may be whiteouts (OVL_XATTR_XWHITEOUT since 6.7)."""

MERGES, HIDES, ELSEWHERE = range(3)
"""what a directory does with those of its name below: is merged with them, hides them, is merged with others"""

_ESCAPE = b"overlay."

MUST_COPY = (b"system.posix_acl_access", b"system.posix_acl_default", b"security.")


def is_whiteout(mode: int, rdev: int) -> bool:
    """Whether a layer's file of this `st_mode` and `st_rdev` says that the name is gone: a character device 0:0."""
    return rdev == 0 and stat.S_ISCHR(mode)


def may_be_xattr_whiteout(mode: int, size: int) -> bool:
    """Whether the file can be a whiteout by xattr: an empty regular file."""
    return size == 0 and stat.S_ISREG(mode)


def may_be_metacopy(mode: int, size: int, blocks: int) -> bool:
    """Whether the file (`blocks` of 512 bytes) can be one without its data: a regular file with a hole."""
    return blocks * 512 < size and stat.S_ISREG(mode)


def must_copy(xattr: bytes) -> bool:
    """Whether a copy-up has to fail when the upper cannot take this xattr (ovl_must_copy_xattr)."""
    return xattr.startswith(MUST_COPY)


def stored(prefix: bytes, xattr: bytes) -> bytes:
    """The name that a layer has for what users of the mount call `xattr`.

    One of theirs that looks like a mark is escaped, so that an overlay can carry another one's layers
    (OVL_XATTR_ESCAPE_PREFIX since 6.7).
    """
    return prefix + _ESCAPE + xattr[len(prefix) :] if xattr.startswith(prefix) else xattr


def shown(prefix: bytes, xattr: bytes) -> bytes | None:
    """What users of the mount call a layer's `xattr`; None for a mark."""
    if not xattr.startswith(prefix):
        return xattr
    escaped = prefix + _ESCAPE
    return prefix + xattr[len(escaped) :] if xattr.startswith(escaped) else None
