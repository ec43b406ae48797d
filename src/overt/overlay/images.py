"""Whiteouts that are files, as image layers have them: first aufs's, then Docker's and OCI's (image-spec, layer.md).

``.wh.name`` says that `name` is gone from the layers below, ``.wh..wh..opq`` that its directory hides what is below. A
tar archive can carry them, and whoever unpacks one as it is has them in a layer. A name that stands beside its own
whiteout is there, and nothing of the layers below shows through it.
"""

from collections.abc import Iterable

from overt.overlay.listing import DT_UNKNOWN, Entry

PREFIX = b".wh."
OPAQUE = b".wh..wh..opq"
"""in a directory that hides what is below it"""
OPAQUE_XATTR = b"user.fuseoverlayfs.opaque"
"""on such a directory that fuse-overlayfs has made, which may be a layer by now"""
_XATTRS = b"user.fuseoverlayfs."


def whiteout_of(name: bytes) -> bytes:
    """The file that says that `name` is gone."""
    return PREFIX + name


def is_mark(name: bytes) -> bool:
    """Whether a name is a mark, and so nothing that is shown."""
    return name.startswith(PREFIX)


def is_mark_xattr(xattr: bytes) -> bool:
    """Whether an xattr is a mark of fuse-overlayfs: nothing that is shown, set, or copied to an upper.

    An upper becomes a layer when it is committed, and there an OPAQUE_XATTR would hide what its directory was merged
    with.
    """
    return xattr.startswith(_XATTRS)


def read(entries: Iterable[tuple[Entry, bool]]) -> list[tuple[Entry, bool]]:
    """One layer's entries, each with whether it is a whiteout, when files may be whiteouts."""
    gone, others = [], []
    for entry, whiteout in entries:
        if not is_mark(entry.name):
            others.append((entry, whiteout))
        elif entry.name != OPAQUE:
            gone.append((Entry(0, DT_UNKNOWN, entry.name[len(PREFIX) :], entry.layer), True))
    return others + gone
