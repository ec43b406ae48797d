"""A tree over lower layers that are unpacked image layers (whiteouts=oci): see `overt.overlay.images`.

Only lower layers are read in this way: what overt writes into an upper are the kernel's marks. Every look-up takes the
long way (`overt.tree.follow`), so that trees without such layers pay nothing.
"""

import errno
import os
from collections.abc import Callable

from overt.overlay import images, marks
from overt.tree.follow import discover
from overt.tree.layer import UPPER, xattr_path
from overt.tree.node import Node
from overt.tree.tree import Tree


class ImageTree(Tree):
    """The merged tree where files may be whiteouts."""

    whiteouts_are_files = True

    def layers_of_root(self) -> tuple[int, ...]:
        """Layers below one whose root hides them are not there."""
        layers = super().layers_of_root()
        for place, layer in enumerate(layers):
            if self.hides(layer, self.layers[layer].root, b"."):
                return layers[: place + 1]
        return layers

    def _discover(self, parent: Node, name: bytes, start: int) -> tuple[Node, os.stat_result] | None:
        return discover(self, parent, name)

    def is_mark(self, layer: int, name: bytes) -> bool:
        """Whether a name of a lower layer is a mark."""
        return layer != UPPER and images.is_mark(name)

    def is_gone(self, layer: int, directory: int, name: bytes) -> bool:
        """Whether a file of the layer says so."""
        return layer != UPPER and _exists(directory, images.whiteout_of(name))

    def hides(self, layer: int, directory: int, name: bytes) -> bool:
        """Whether a directory of the layer has the file that says that it hides what is below."""
        return layer != UPPER and (
            _exists(directory, name + b"/" + images.OPAQUE) or _is_marked(xattr_path(directory, name))
        )

    # xattrs

    def carried(self, layer: int) -> Callable[[bytes], bytes | None]:
        """How a copy of a layer's file calls its xattrs; None for one that stays behind."""
        plain = super().carried(layer)
        return lambda xattr: None if images.is_mark_xattr(xattr) else plain(xattr)

    def stored_xattr(self, node: Node, name: bytes) -> bytes:
        """The name that a file's layer has for what users call `name`; EPERM for a mark."""
        if images.is_mark_xattr(name):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return super().stored_xattr(node, name)

    def shown_xattr(self, node: Node, name: bytes) -> bytes | None:
        """What users call an xattr of a file's layer; None for a mark."""
        return None if images.is_mark_xattr(name) else super().shown_xattr(node, name)


def _is_marked(directory: bytes) -> bool:
    try:
        return os.getxattr(directory, images.OPAQUE_XATTR, follow_symlinks=False) == marks.OPAQUE_YES
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        return False


def _exists(directory: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return False
        raise
    return True
