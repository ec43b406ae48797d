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
_SECURITY = b"security."
_VALUE = re.compile(rb"([0-9]{1,10}):([0-9]{1,10}):([0-7]{1,7})(?::(dir|file))?")
_ROOM = 0o755
"""what the server, and who shares the layers, may do with a file whose mode is kept elsewhere"""


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
    if match is None:
        raise ValueError(value)
    return Owner(int(match[1]), int(match[2]), stat.S_IMODE(int(match[3], 8)))


def can_carry(mode: int) -> bool:
    """Whether a file of this st_mode can have the xattr."""
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def backing(mode: int) -> int:
    """The mode that a file itself has, whose mode in the xattr is this."""
    return mode & 0o777 | _ROOM


def stored(kind: bytes | None, xattr: bytes) -> bytes:
    """The name that a layer of this kind has for what users of the mount call `xattr`.

    Where the mounting user is not the host's root, what only root may write is kept under another name.
    """
    return _OVERRIDE + xattr if kind == CONTAINERS and xattr.startswith(_SECURITY) else xattr


def shown(kind: bytes | None, xattr: bytes) -> bytes | None:
    """What users of the mount call a layer's `xattr`; None for what is not theirs."""
    if xattr in KINDS:
        return None
    if kind == CONTAINERS and xattr.startswith(_SECURITY):
        return None
    return xattr[len(_OVERRIDE) :] if kind == CONTAINERS and xattr.startswith(_OVERRIDE + _SECURITY) else xattr
