"""Owners and modes that are kept in an xattr (fuse-overlayfs's xattr_permissions, force_mask in storage.conf).

For layers on filesystems where the mounting user can have no files of others. The xattr is ``UID:GID:MODE``, the mode
in octal; what a file has itself means nothing then. Only regular files and directories can carry it: symlinks, devices
and FIFOs have owners of their own. Which xattr it is, a layer's root says by having it.
"""

import re
import stat
from typing import NamedTuple

PRIVILEGED = b"security.fuseoverlayfs.override_stat"
"""xattr_permissions=1: nobody but the host's root can write it"""
CONTAINERS = b"user.containers.override_stat"
"""xattr_permissions=2"""
USER = b"user.fuseoverlayfs.override_stat"
"""the same, before version 1.7 of fuse-overlayfs, and on an upper that has it already"""
KINDS = (PRIVILEGED, CONTAINERS, USER)

_OVERRIDE = b"user.containers.override_"
_OURS = (_OVERRIDE, b"user.fuseoverlayfs.", b"security.fuseoverlayfs.")
_SECURITY = b"security."
_VALUE = re.compile(rb"([0-9]{1,10}):([0-9]{1,10}):([0-7]{1,7})(?::(dir|file))?")
_ROOM = 0o755
"""what the server, and who shares the layers, may do with a file whose mode is kept elsewhere"""


_NO_ID = 2**32 - 1
"""a uid_t that is nobody's (chown(2))"""


class Owner(NamedTuple):
    """Whose a file is, and what others may do with it (S_IMODE)."""

    uid: int
    gid: int
    mode: int


def encode(owner: Owner) -> bytes:
    """The value of the xattr."""
    return b"%d:%d:%o" % owner


def decode(value: bytes) -> Owner:
    """What the value of the xattr says; ValueError if it is none, or of a file that is not what it seems to be."""
    match = _VALUE.fullmatch(value.rstrip(b"\0"))
    if match is None or max(int(match[1]), int(match[2])) >= _NO_ID:
        raise ValueError(value)
    return Owner(int(match[1]), int(match[2]), stat.S_IMODE(int(match[3], 8)))


def can_carry(mode: int) -> bool:
    """Whether a file of this st_mode can have the xattr."""
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def backing(mode: int) -> int:
    """The mode that a file itself has, whose mode in the xattr is this."""
    return mode & 0o777 | _ROOM


def are_ours(xattr: bytes) -> bool:
    """Whether an xattr of this name can mean something in a layer of some kind.

    Users of the mount must not have it, whatever kind their layer is of: what means nothing here does so elsewhere, and
    who could write ``0:0:4755`` would be root.
    """
    return xattr.startswith(_OURS)


def stored(kind: bytes | None, xattr: bytes) -> bytes:
    """The name that a layer of this kind has for what users of the mount call `xattr`; ValueError: not for them to set.

    Where the mounting user is not the host's root, what only root may write is kept under another name.
    """
    if are_ours(xattr):
        raise ValueError(xattr)
    return _OVERRIDE + xattr if kind == CONTAINERS and xattr.startswith(_SECURITY) else xattr


def shown(kind: bytes | None, xattr: bytes) -> bytes | None:
    """What users of the mount call a layer's `xattr`; None for what is not theirs."""
    if kind == CONTAINERS:
        if xattr.startswith(_SECURITY):
            return None
        if xattr.startswith(_OVERRIDE + _SECURITY):
            xattr = xattr[len(_OVERRIDE) :]
    return None if are_ours(xattr) else xattr
