"""Data that is not where a file's attributes are (metacopy, data-only layers).

A file whose attributes alone were copied up, or one of a layer that holds nothing but attributes, carries a mark, and
its data is that of a file further down: in a lower layer under the same name or a redirect, or in a data-only layer,
which is never merged and is looked into only when the data is wanted (ovl_maybe_lookup_lowerdata).
"""

import errno
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from overt.host.files import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2
from overt.tree.places import Place, open_place

if TYPE_CHECKING:
    from overt.tree.layer import Layer
    from overt.tree.node import Node
    from overt.tree.tree import Tree

NOT_YET = -1
"""in place of a layer: in one of the data-only layers, and not looked for yet"""


class Data(NamedTuple):
    """Where a file's data is."""

    layer: int
    place: Place


def open_data(tree: "Tree", node: "Node", flags: int) -> int:
    """Open the file that has the data of one without; the last layer's error where none has it."""
    data = node.data
    assert data is not None
    if data.layer in tree.layers:
        return _open(tree.layers[data.layer], data.place, flags)
    problem = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    for layer in tree.data.values() if data.layer == NOT_YET else (tree.data[data.layer],):
        try:
            fd = _open_beneath(layer, data.place, flags)
        except OSError as error:
            problem = error
            continue
        node.data = Data(layer.index, data.place)
        return fd
    raise problem


def blocks_of_data(tree: "Tree", node: "Node", size: int, blksize: int) -> int:
    """How many blocks of 512 bytes the data takes that a file of `size` bytes has elsewhere (ovl_getattr).

    Those of the file that has it; as if there were no holes while nobody has looked for it in the data-only layers.
    """
    data = node.data
    assert data is not None
    if data.layer == NOT_YET:
        return -(-size // blksize) * blksize // 512
    fd = open_data(tree, node, os.O_PATH | os.O_CLOEXEC)
    try:
        return os.fstat(fd).st_blocks
    finally:
        os.close(fd)


def _open(layer: "Layer", place: Place, flags: int) -> int:
    directory = open_place(layer.root, place[:-1])
    try:
        return _must_be_file(os.open(place[-1], flags | os.O_NOFOLLOW, dir_fd=directory), errno.EIO)
    finally:
        os.close(directory)


def _open_beneath(layer: "Layer", place: Place, flags: int) -> int:
    """The kernel looks into a data-only layer by path; ``..`` is allowed there, but not to lead out."""
    resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV
    return _must_be_file(openat2(layer.root, b"/".join(place), flags, resolve=resolve), errno.ENOENT)


def _must_be_file(fd: int, code: int) -> int:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(code, os.strerror(code))
    return fd
