"""Where a directory is in a layer, when that is not where its name in the merged tree says."""

import os
from typing import TYPE_CHECKING

from overt.tree.layer import UPPER

if TYPE_CHECKING:
    from overt.tree.node import Node

Place = tuple[bytes, ...]
"""the names that lead to a file from the root of its layer"""

DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""how a directory is opened to get at a name in it"""


def place_of(node: "Node", layer: int) -> Place:
    """Where a directory is in one of its layers."""
    names: list[bytes] = []
    while node.parent is not None:
        if node.places is not None and layer in node.places:
            return (*node.places[layer], *reversed(names))
        names.append(node.name)
        node = node.parent
    return tuple(reversed(names))


def open_place(root: int, place: Place) -> int:
    """An O_PATH descriptor of the directory at `place` below `root`."""
    fd = -1
    for name in place or (b".",):
        above, fd = fd, os.open(name, DIRECTORY, dir_fd=root if fd < 0 else fd)
        if above >= 0:
            os.close(above)
    return fd


def keep_places(node: "Node") -> None:
    """Remember where a directory's lower parts are, which stay there when it is renamed."""
    if node.is_dir and node.merged:
        node.places = {layer: place_of(node, layer) for layer in node.layers if layer != UPPER}
