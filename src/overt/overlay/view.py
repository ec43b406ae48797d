"""How files are shown: a mount that shows other owners, link counts or xattrs than its layers have.

What fuse-overlayfs can do and kernel overlayfs cannot. *stored* is what a layer has, *shown* is what a program in the
mount sees. An id that no range has is shown as none: to the kernel such a file has no owner, and stat(2) says the
overflow id. (fuse-overlayfs shows the overflow id itself, which is an id: whoever has it would own all these files.)
On the way in it is stored as the overflow id, which is shown as itself: what the host's root makes who starts a
container, say.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

OVERFLOW = 65534
_IDS = 1 << 32
NO_ID = _IDS - 1
"""what the kernel takes for nobody's, (uid_t)-1"""

VALUES = {
    "uidmapping": "STORED:SHOWN:LENGTH[:STORED:SHOWN:LENGTH...]",
    "gidmapping": "STORED:SHOWN:LENGTH[:STORED:SHOWN:LENGTH...]",
    "squash_to_uid": "the number of a user",
    "squash_to_gid": "the number of a group",
    "timeout": "a number of seconds",
    "noxattrs": "0 or 1",
    "context": "an SELinux context",
    "xattr_permissions": "0, 1 or 2",
}
FLAGS = ("squash_to_root", "static_nlink", "noacl")
"""the options of this page: those with a value, and which; and those without"""


class Range(NamedTuple):
    """So many ids."""

    stored: int
    shown: int
    length: int


class View(NamedTuple):
    """What a mount shows; `View()` shows everything as it is."""

    uids: tuple[Range, ...] = ()
    gids: tuple[Range, ...] = ()
    squash_uid: int | None = None
    """show this as the owner of every file"""
    squash_gid: int | None = None
    static_nlink: bool = False
    """show directories with one link"""
    acl: bool = True
    xattrs: bool = True
    timeout: float | None = None
    """for how many seconds the kernel may keep names and attributes; None for as long as it likes"""
    context: str | None = None
    """the SELinux context of every file"""
    permissions: int = 0
    """owners and modes are kept in xattrs (overt.overlay.owners): 0 not at all, 1 privileged ones, 2 any user's"""

    @property
    def maps(self) -> bool:
        """Whether ids are not shown as they are."""
        return bool(self.uids or self.gids) or self.squash_uid is not None or self.squash_gid is not None

    @property
    def changes(self) -> bool:
        """Whether anything has to be done at a request."""
        return self.maps or self.static_nlink or not self.acl or not self.xattrs or bool(self.permissions)


def parse(values: Mapping[str, str], flags: set[str]) -> View:
    """The view that VALUES and FLAGS ask for; raise ValueError, whose text names the option."""
    squash = 0 if "squash_to_root" in flags else None
    xattrs = _number("noxattrs", values.get("noxattrs", "0")) == 0
    permissions = _number("xattr_permissions", values.get("xattr_permissions", "0"))
    if permissions > 2:
        raise ValueError(f"xattr_permissions={permissions}: not 0, 1 or 2")
    return View(
        _ranges("uidmapping", values.get("uidmapping", "")),
        _ranges("gidmapping", values.get("gidmapping", "")),
        _id("squash_to_uid", values, squash),
        _id("squash_to_gid", values, squash),
        "static_nlink" in flags,
        xattrs and "noacl" not in flags and not permissions,  # a mode that is kept elsewhere has no mask
        xattrs,
        _seconds(values["timeout"]) if "timeout" in values else None,
        values["context"].strip('"') if "context" in values else None,
        permissions,
    )


def from_fields(fields: Sequence[object]) -> View:
    """A View that was a list in JSON."""
    view = View(*fields)  # type: ignore[arg-type]
    return view._replace(uids=tuple(Range(*row) for row in view.uids), gids=tuple(Range(*row) for row in view.gids))


def _ranges(key: str, text: str) -> tuple[Range, ...]:
    words = [word for word in text.split(":") if word]
    if not all(word.isdecimal() and int(word) < _IDS for word in words) or len(words) % 3:
        raise ValueError(f"{key}={text}: not STORED:SHOWN:LENGTH[:STORED:SHOWN:LENGTH...], in numbers")
    numbers = [int(word) for word in words]
    if any(max(numbers[at : at + 2]) + numbers[at + 2] > NO_ID for at in range(0, len(numbers), 3)):
        raise ValueError(f"{key}={text}: a range ends above {NO_ID - 1}, the highest id")
    return tuple(Range(*numbers[start : start + 3]) for start in range(0, len(numbers), 3))


def _id(key: str, values: Mapping[str, str], otherwise: int | None) -> int | None:
    if key not in values:
        return otherwise
    if not values[key].isdecimal() or int(values[key]) >= NO_ID:
        raise ValueError(f"{key}={values[key]}: not the number of a user or group")
    return int(values[key])


def _number(key: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{key}={text}: not a number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < _IDS:
        raise ValueError(f"timeout={text}: not a number of seconds")
    return seconds


class IdMap:
    """One kind of id, users or groups."""

    __slots__ = ("_ranges", "_squash")

    def __init__(self, ranges: Sequence[Range], squash: int | None) -> None:
        self._ranges = ranges
        self._squash = squash

    def shown(self, stored: int) -> int:
        """What an id in a layer is shown as."""
        if self._squash is not None:
            return self._squash
        for start, shown, length in self._ranges:
            if start <= stored < start + length:
                return shown + stored - start
        return stored if not self._ranges or stored == OVERFLOW else NO_ID

    def stored(self, shown: int) -> int:
        """What an id of the mount's users is in a layer; a squashed mount takes its users' ids as they are."""
        for start, first, length in self._ranges:
            if first <= shown < first + length:
                return start + shown - first
        return OVERFLOW if self._ranges else shown


# What carries ids inside of an xattr (linux/posix_acl_xattr.h, linux/capability.h)

ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
CAPABILITY = b"security.capability"
_VERSION = struct.Struct("<I")
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_USER, _ACL_GROUP = 0x02, 0x08
_CAP_REVISION_2, _CAP_REVISION_3, _CAP_FLAGS = 0x02000000, 0x03000000, 0xFF
_CAP_SIZE_2, _CAP_SIZE_3 = 20, 24


def acl(value: bytes, uid: Callable[[int], int], gid: Callable[[int], int]) -> bytes:
    """An access control list with its ids translated; entries for nobody are left out."""
    entries = []
    for tag, permissions, number in _ACL_ENTRY.iter_unpack(value[4 : 4 + (len(value) - 4) // 8 * 8]):
        named = tag in (_ACL_USER, _ACL_GROUP)
        translated = number if not named else uid(number) if tag == _ACL_USER else gid(number)
        if not named or translated != NO_ID:
            entries.append(_ACL_ENTRY.pack(tag, permissions, translated))
    return value[:4] + b"".join(entries)


def shown_capability(value: bytes, uid: Callable[[int], int]) -> bytes:
    """File capabilities of a layer, for the root user that theirs is shown as; without one (revision 2) that is 0."""
    return _capability(value, uid(_root(value))) if len(value) in (_CAP_SIZE_2, _CAP_SIZE_3) else value


def stored_capability(value: bytes, uid: Callable[[int], int]) -> bytes:
    """The way back. What comes without a root user is from the host, for whatever root user there is."""
    return _capability(value, uid(_root(value))) if len(value) == _CAP_SIZE_3 else value


def _root(value: bytes) -> int:
    return int(_VERSION.unpack_from(value, _CAP_SIZE_2)[0]) if len(value) == _CAP_SIZE_3 else 0


def _capability(value: bytes, root: int) -> bytes:
    (magic,) = _VERSION.unpack_from(value)
    revision = _CAP_REVISION_3 if root else _CAP_REVISION_2
    body = _VERSION.pack(magic & _CAP_FLAGS | revision) + value[4:_CAP_SIZE_2]
    return body + _VERSION.pack(root) if root else body
