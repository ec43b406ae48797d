"""Which files of the upper are copies, and of what (the origin and impure marks)."""

import os
from typing import TYPE_CHECKING

from overt.overlay import marks
from overt.tree.layer import UPPER, xattr_path

if TYPE_CHECKING:
    from overt.tree.node import Node
    from overt.tree.tree import Tree


def is_impure(tree: "Tree", directory: "Node") -> bool:
    """Whether there may be copies in the upper part of a directory."""
    if directory.impure is None:
        directory.impure = directory.layer == UPPER and (
            tree.layers[UPPER].mark(tree.dir_fd(directory, UPPER), b".", marks.IMPURE) is not None
        )
    return directory.impure


def make_impure(tree: "Tree", directory: "Node") -> None:
    """A copy is about to come into the upper part of a directory (ovl_set_impure)."""
    if not is_impure(tree, directory):
        os.setxattr(xattr_path(tree.dir_fd(directory, UPPER), b"."), tree.prefix + marks.IMPURE, b"y")
        directory.impure = True


def has_origin(tree: "Tree", node: "Node") -> bool:
    """Whether a file of the upper, or a directory's upper part, is a copy."""
    return node.merged if node.is_dir else node.key in tree.origins


def origin_of(tree: "Tree", directory: int, name: bytes, st: os.stat_result) -> os.stat_result | None:
    """The lower file that one of the upper, which is `st`, is a copy of.

    None where that is not known, or there may be other copies of it: of one that has several names.
    """
    if tree.key_of(st) in tree.origins:
        return None  # the number is known already
    value = tree.layers[UPPER].mark(directory, name, marks.ORIGIN)
    found = tree.handles.find(value, st.st_mode) if value else None
    return found if found is not None and found.st_nlink == 1 else None


def times_of(directory: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """A directory's times, to be put back: a copy-up is no change that anybody made (ovl_set_timestamps)."""
    st = os.fstat(directory)
    atime, mtime = divmod(st.st_atime_ns, 10**9), divmod(st.st_mtime_ns, 10**9)
    return atime, mtime
