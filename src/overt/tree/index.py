"""Hard links of lower layers that stay one file (index=on): see `overt.overlay.index`.

Such a file is one node, before and after its copy-up. When it has an entry in the index, that is where it is found: its
names in the merged tree are all further names, and which of them the upper has matters only to who changes one. A
name that is to be changed is given to the upper first (ovl_link_up), so that the change is the same as of any file's.
"""

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from overt.host.files import utimensat
from overt.overlay import index, marks
from overt.overlay.origin import UNKNOWN
from overt.tree.copies import is_impure, make_impure, times_of
from overt.tree.data import Data
from overt.tree.layer import UPPER
from overt.tree.node import Node
from overt.tree.places import place_of

if TYPE_CHECKING:
    from overt.tree.tree import Tree


class Links:
    """How many links a file in the index has: `lower` in its layer, and `beside` those of the upper file."""

    __slots__ = ("beside", "lower")

    def __init__(self, lower: int) -> None:
        self.lower = lower
        self.beside = 0


class Index:
    """The index directory, and which files are in it. Closes `fd`."""

    __slots__ = ("fd", "place")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.place = Node(0, None, b"", (UPPER,), stat.S_IFDIR, 0)
        """the directory as the parent of its entries' nodes; it is not in the merged tree"""
        self.place.fds = {UPPER: fd}

    # Looking up

    def enter(
        self, tree: "Tree", parent: Node, name: bytes, layer: int, st: os.stat_result, data: Data | None = None
    ) -> tuple[Node, os.stat_result]:
        """The node of a file that has several links in its layer, and its attributes; `data`: where its data is."""
        if layer == UPPER:
            node = self._enter_upper(tree, parent, name, st)
            node.data = node.data or data
            return node, st
        key = st.st_dev, st.st_ino, "lower"
        known = tree.files.get(key)
        if known is not None:
            tree.name(known, parent, name)
            return known, st
        entry = self.entry(tree, layer, tree.dir_fd(parent, layer), name)
        done = self._find(entry)
        if done is not None:
            if stat.S_IFMT(done.st_mode) != stat.S_IFMT(st.st_mode):
                raise OSError(errno.EIO, "an index entry of another kind")
            lacks_data = tree.layers[UPPER].lacks_data(self.fd, entry, done)
            if lacks_data and not tree.metacopy:
                raise OSError(errno.EPERM, "a file without its data")
            node = tree.enter(parent, name, (UPPER,), done, st)
            beside = self._beside(tree, entry, st.st_nlink, done.st_nlink)
            if self._place(node, entry, st.st_nlink, beside) and lacks_data:
                node.data = data or Data(layer, (*place_of(parent, layer), name))
                node.redirect = tree.layers[UPPER].mark(self.fd, entry, marks.REDIRECT)
            return node, done
        node = tree.enter(parent, name, (layer,), st)
        node.data = data
        node.index = Links(st.st_nlink)
        node.key = key
        tree.files[key] = node
        return node, st

    def _enter_upper(self, tree: "Tree", parent: Node, name: bytes, st: os.stat_result) -> Node:
        origin = None
        if tree.key_of(st) not in tree.files and is_impure(tree, parent):
            origin = tree.layers[UPPER].mark(tree.dir_fd(parent, UPPER), name, marks.ORIGIN)
        lower = tree.handles.find(origin, st.st_mode) if origin else None
        if origin is None or lower is None:
            return tree.enter(parent, name, (UPPER,), st)
        entry = index.entry_of(origin)
        done = self._find(entry)
        if done is None or not os.path.samestat(done, st):
            return tree.enter(parent, name, (UPPER,), st, lower if lower.st_nlink == 1 else None)
        node = tree.enter(parent, name, (UPPER,), st, lower)
        self._place(node, entry, lower.st_nlink, self._beside(tree, entry, lower.st_nlink, st.st_nlink))
        return node

    def entry(self, tree: "Tree", layer: int, directory: int, name: bytes) -> bytes:
        """The name of the entry for `name` in `directory` of a lower layer."""
        handle = tree.handles.of(tree.layers[layer], directory, name)
        if handle == UNKNOWN:
            raise OSError(errno.EIO, "a file without a handle")
        return index.entry_of(handle)

    def _find(self, entry: bytes) -> os.stat_result | None:
        try:
            return os.stat(entry, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _beside(self, tree: "Tree", entry: bytes, lower: int, upper: int) -> int:
        union = index.union(tree.layers[UPPER].mark(self.fd, entry, marks.NLINK), lower, upper)
        return 0 if union is None else union - upper

    def _place(self, node: Node, entry: bytes, lower: int, beside: int) -> bool:
        """Note where a node has its entry; False if that is known already."""
        if node.parent is self.place:
            return False
        assert node.parent is not None
        node.links = {*(node.links or ()), (node.parent, node.name)}
        node.parent, node.name = self.place, entry
        node.index = Links(lower)
        node.index.beside = beside
        return True

    # Changing

    def copied_up(self, node: Node, entry: bytes) -> None:
        """A file has got its entry, whose mark says that the upper lacks all of its names."""
        self._place(node, entry, node.index.lower, node.index.lower - 1)

    def link_up(self, tree: "Tree", node: Node, parent: Node, name: bytes) -> None:
        """See to it that the upper has this name of a file in the index."""
        upper = tree.dir_fd(parent, UPPER)
        try:
            os.stat(name, dir_fd=upper, follow_symlinks=False)
            return
        except FileNotFoundError:
            pass
        tree.changed.append(parent.id)  # as after any copy-up
        make_impure(tree, parent)
        links = node.index
        union = tree.stat(node).st_nlink + links.beside
        self._write(tree, node, index.beside_lower(union - links.lower))
        times = times_of(upper)
        os.link(node.name, name, src_dir_fd=self.fd, dst_dir_fd=upper, follow_symlinks=False)
        links.beside -= 1
        with contextlib.suppress(OSError):  # likewise
            utimensat(upper, b".", *times)
        self.settle(tree, node)

    def settle(self, tree: "Tree", node: Node) -> None:
        """Before links of the upper come and go: say how many there are beside them, which stays true."""
        self._write(tree, node, index.beside_upper(node.index.beside))

    def _write(self, tree: "Tree", node: Node, value: bytes) -> None:
        os.setxattr(tree.path(node), tree.prefix + marks.NLINK, value, follow_symlinks=False)

    def unlinked(self, tree: "Tree", node: Node) -> None:
        """A name has gone; with the last one goes the entry (ovl_cleanup_index).

        That a lower layer has got links meanwhile must not take it away too soon: then its name in the upper counts.
        """
        links = node.index
        try:
            upper = tree.stat(node).st_nlink
        except OSError:  # the name is gone by then; the next mount finds the entry without its file
            return
        if upper + links.beside > 0:
            return
        if upper > 1 or node.links:
            links.beside = 1 - upper if node.links else -1
            self.settle(tree, node)
            return
        try:
            anchor = os.open(node.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        except OSError:  # likewise
            return
        try:
            os.unlink(node.name, dir_fd=self.fd)
        except OSError:
            os.close(anchor)
            return
        node.index = None
        node.anchor = anchor
        tree.origins.pop(node.key, None)
