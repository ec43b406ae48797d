"""Directories read and merged (fs/overlayfs/readdir.c)."""

import os
from collections.abc import Iterator

from overt.host.files import getdents
from overt.overlay import images, marks
from overt.overlay.listing import DT_CHR, DT_UNKNOWN, Entry, Listing, merge
from overt.tree.layer import UPPER
from overt.tree.node import Node
from overt.tree.tree import Tree
from overt.wire.dirent import parse

_DT_REG = 8
_DEVICES = frozenset((DT_CHR, DT_UNKNOWN))
_ANY = _DEVICES | {_DT_REG}
"""of what kind a whiteout may be, without and with xattr whiteouts"""
_ROOM = 1 << 18
_rooms: list[bytearray] = []
"""buffers that nobody reads into just now; two threads may be reading directories of two trees"""


def entries(fd: int, layer: int = 0) -> Iterator[Entry]:
    """All names in an open directory but ``.`` and ``..``, whiteouts too."""
    try:
        room = _rooms.pop()
    except IndexError:
        room = bytearray(_ROOM)
    try:
        while size := getdents(fd, room):
            for ino, kind, name in parse(room, size):
                if name != b"." and name != b"..":
                    yield Entry(ino, kind, name, layer)
    finally:
        _rooms.append(room)


def _layer_entries(tree: Tree, node: Node, layer: int) -> list[tuple[Entry, bool]]:
    fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree.dir_fd(node, layer))
    try:
        kinds = _ANY if tree.layers[layer].xattr_whiteouts else _DEVICES
        found = [(entry, entry.kind in kinds and _hides(tree, fd, entry, layer)) for entry in entries(fd, layer)]
        return images.read(found) if tree.whiteouts_are_files and layer != UPPER else found
    finally:
        os.close(fd)


def _hides(tree: Tree, fd: int, entry: Entry, layer: int) -> bool:
    if entry.kind == DT_CHR or entry.kind == DT_UNKNOWN:
        st = os.stat(entry.name, dir_fd=fd, follow_symlinks=False)
        return marks.is_whiteout(st.st_mode, st.st_rdev)
    if entry.kind == _DT_REG and tree.layers[layer].xattr_whiteouts:
        st = os.stat(entry.name, dir_fd=fd, follow_symlinks=False)
        return tree.layers[layer].is_xattr_whiteout(fd, entry.name, st)
    return False


def read(tree: Tree, node: Node) -> Listing:
    """The merged listing of a directory."""
    if node.dropped:
        return Listing([])
    layers = [_layer_entries(tree, node, layer) for layer in node.layers]
    if len(layers) == 1 and not tree.whiteouts_are_files:
        return Listing([entry for entry, hides in layers[0] if not hides])
    return Listing(merge(layers))


def is_empty(tree: Tree, node: Node) -> bool:
    """Whether the merged directory has no entries."""
    return not len(read(tree, node))


_INDEX_AFTER = 16
_INDEX_BYTES = 1 << 16


def index_if_busy(tree: Tree, node: Node) -> None:
    """Read a merged directory whose layers are asked for many names, unless it is large: see `Kept`."""
    if node.misses != _INDEX_AFTER or node.listing is not None:
        return
    node.misses += 1
    if sum(os.fstat(tree.dir_fd(node, layer)).st_size for layer in node.layers) <= _INDEX_BYTES:
        node.listing = read(tree, node)
        tree.kept.keep(node)
