"""What every change of a name in the upper takes: the directory, whiteouts, marks, the listing (fs/overlayfs/dir.c).

What a lower layer has under a name is hidden by a whiteout in the upper.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator

from overt.overlay import marks, protection
from overt.overlay.listing import DT_UNKNOWN, Entry
from overt.overlay.redirect import absolute
from overt.tree.copyup import copy_up
from overt.tree.flags import refuse
from overt.tree.layer import UPPER, xattr_path
from overt.tree.node import Node
from overt.tree.tree import Tree


def failure(code: int) -> OSError:
    """What a system call that ends with this errno raises."""
    return OSError(code, os.strerror(code))


def upper_of(tree: Tree, directory: Node) -> int:
    """The upper's descriptor of a directory in which something is to change; EPERM for an immutable one."""
    if directory.dropped or (directory.anchor >= 0 and directory.parent is not None):
        raise failure(errno.ENOENT)
    refuse(tree, directory, protection.IMMUTABLE)
    copy_up(tree, directory)
    return tree.dir_fd(directory, UPPER)


def has_whiteout(directory: int, name: bytes) -> bool:
    """Whether a directory of a layer has a whiteout (a device 0:0) of this name."""
    try:
        st = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return marks.is_whiteout(st.st_mode, st.st_rdev)


def clean(remove: Callable[..., None], name: bytes, directory: int) -> None:
    """Remove what a change has left over. The change is made by then, so that this fails is no failure of it.

    What stays is in the work directory, which the next mount clears; or it is a whiteout that hides nothing.
    """
    with contextlib.suppress(OSError):
        remove(name, dir_fd=directory)


def set_opaque(tree: Tree, directory: int, name: bytes) -> None:
    """Mark a directory of the upper as one that hides what the layers below have in it."""
    os.setxattr(xattr_path(directory, name), tree.prefix + marks.OPAQUE, marks.OPAQUE_YES)


def relist(tree: Tree, parent: Node, name: bytes, node: Node | None) -> None:
    """Keep a directory's listing up to date."""
    listing = parent.listing
    if listing is None:
        return
    before = len(listing)
    if node is None:
        listing.discard(name)
    else:
        listing.add(Entry(node.ino, node.mode >> 12 if node.mode else DT_UNKNOWN, name, UPPER))
    tree.kept.changed(parent, len(listing) - before)
    if listing.gaps > len(listing) + 64 and not parent.readers:
        tree.kept.forget(parent)
        parent.listing = None  # nobody holds a cookie of it: it is made anew when it is needed


def set_redirect(tree: Tree, node: Node, parent: Node, name: bytes, *, same: bool) -> None:
    """Where its lower part is, from now on under whichever name (ovl_set_redirect); EXDEV if that cannot be said."""
    if node.redirect is not None and (same or node.redirect.startswith(b"/")):
        return
    if tree.index is not None and parent is tree.index.place:  # no name is known, and the entry's is none
        place = node.data.place if node.data is not None else None
        value = b"/" + b"/".join(place) if place else None
    else:
        value = name if same else absolute(((name, node.redirect), *_upwards(parent)))
    if value is None:
        raise failure(errno.EXDEV)
    try:
        os.setxattr(tree.path(node), tree.prefix + marks.REDIRECT, value, follow_symlinks=False)
    except OSError:
        raise failure(errno.EXDEV) from None  # who renames then copies and deletes, as between filesystems
    node.redirect = value


def _upwards(node: Node) -> Iterator[tuple[bytes, bytes | None]]:
    while node.parent is not None:
        yield node.name, node.redirect
        node = node.parent
