"""Look-ups that marks lead elsewhere: what a redirect, in whichever layer, says of the layers below it (ovl_lookup).

`Tree._discover` knows what is needed of nearly every name, and leaves a name to this module when one of its layers
carries a redirect or has a file without its data. A path is followed name by name, each in one directory descriptor and
never through a symlink: nothing leads out of a layer.
"""

import errno
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from overt.overlay import marks, redirect
from overt.tree.copies import is_impure, origin_of
from overt.tree.data import NOT_YET, Data
from overt.tree.layer import UPPER
from overt.tree.places import DIRECTORY, Place, place_of

if TYPE_CHECKING:
    from overt.tree.node import Node
    from overt.tree.tree import Tree


class Found(NamedTuple):
    """A file of one layer."""

    layer: int
    place: Place
    st: os.stat_result


class Search:
    """One look-up on its way down the layers (struct ovl_lookup_data)."""

    def __init__(self, tree: "Tree", parent: "Node", name: bytes) -> None:
        self.tree = tree
        self.parent = parent
        self.name = name
        """what to look for in the next layer: a name in the parent's directory there, or a path from the root"""
        self.found: list[Found] = []
        """the parts of a merged directory, or one file, uppermost first"""
        self.redirect: bytes | None = None
        """where the layers below are to be searched instead"""
        self.upper_redirect: bytes | None = None
        self.metacopy = False
        """whether the file found last has no data"""
        self._is_dir = self._stop = False

    def run(self) -> "Search":
        """Ask all layers that have to be asked.

        EPERM where a mark would have to be followed and must not be, EIO where there is no data.
        """
        layers = self.parent.layers
        while layers and not self._stop:
            layer, layers = layers[0], layers[1:]
            if layer != UPPER:
                self._must_follow()
            part = self._in_layer(layer)
            if part is not None:
                self.found.append(part)
            if layer == UPPER:
                self.upper_redirect = self.redirect
            if self.redirect is not None and self.redirect.startswith(b"/"):
                layers = tuple(index for index in self.tree.root.layers if index > layer)
        if self.in_data_layer:
            return self
        self._must_follow()
        if self.metacopy:
            raise OSError(errno.EIO, "a file without its data")
        return self

    @property
    def in_data_layer(self) -> bool:
        """Whether the data is to be looked for, when it is wanted, in data-only layers."""
        lower = any(part.layer != UPPER for part in self.found)
        path = self.redirect is not None and self.redirect.startswith(b"/")
        return self.metacopy and path and lower and bool(self.tree.data)

    def _must_follow(self) -> None:
        if self.metacopy and not self.tree.metacopy:
            raise OSError(errno.EPERM, "a file without its data")
        if self.redirect is not None and not self.tree.follows:
            raise OSError(errno.EPERM, "a redirect")

    def _in_layer(self, layer: int) -> Found | None:
        path = self.name
        if not path.startswith(b"/"):
            st = self._element(layer, self.tree.dir_fd(self.parent, layer), path, b"")
            return Found(layer, (*place_of(self.parent, layer), path), st) if st is not None else None
        place = tuple(path[1:].split(b"/"))
        directory, rest = self.tree.layers[layer].root, path
        opened = -1
        try:
            for number, name in enumerate(place):
                rest = rest[len(name) + 1 :]
                st = self._element(layer, directory, name, rest)
                if st is None:
                    return None
                if number == len(place) - 1:
                    return Found(layer, place, st)
                above, opened = opened, os.open(name, DIRECTORY, dir_fd=directory)
                directory = opened
                if above >= 0:
                    os.close(above)
            return None
        finally:
            if opened >= 0:
                os.close(opened)

    def _element(self, layer: int, directory: int, name: bytes, rest: bytes) -> os.stat_result | None:
        """Look for one name of the path, which `rest` follows, and learn what it says of the layers below."""
        last = not rest
        files = self.tree.whiteouts_are_files
        if files and self.tree.is_mark(layer, name):
            return None
        gone = files and self.tree.is_gone(layer, directory, name)
        try:
            st = os.stat(redirect.checked_name(name), dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                self._stop = self._stop or gone
                return None
            raise
        if self.tree.is_whiteout(layer, directory, name, st):
            self._stop = True
            return None
        found_in = self.tree.layers[layer]
        if not stat.S_ISDIR(st.st_mode):
            self._stop = True
            if self._is_dir or not last or (self.metacopy and not stat.S_ISREG(st.st_mode)):
                return None
            self.metacopy = found_in.lacks_data(directory, name, st)
            self._stop = gone or not self.metacopy
            if self._stop or (layer == self.tree.bottom and not self.tree.data):
                return st
        else:
            if last and self.metacopy:
                self._stop = True
                return None
            self._is_dir = self._is_dir or last
            if layer == self.tree.bottom:
                return st
            if found_in.mark(directory, name, marks.OPAQUE) == marks.OPAQUE_YES or (
                files and (gone or self.tree.hides(layer, directory, name))
            ):
                self._stop = True
                return st
        value = found_in.mark(directory, name, marks.REDIRECT)
        if value is not None:
            value = redirect.checked(value)
            self.name = self.redirect = redirect.onward(self.name, name, rest, value)
            if value.startswith(b"/"):
                self._stop = False  # whatever was opaque above: this says where to go on
        return st


def discover(tree: "Tree", parent: "Node", name: bytes) -> "tuple[Node, os.stat_result] | None":
    """The node that `name` is in directory `parent`, and its attributes; None without one."""
    search = Search(tree, parent, name).run()
    found = search.found
    if not found:
        return None
    layers = tuple(part.layer for part in found)
    top, below = found[0].st, found[1].st if len(found) > 1 and layers[0] == UPPER else None
    if stat.S_ISDIR(top.st_mode):
        node = tree.enter(parent, name, layers, top, below)
        node.places = {part.layer: part.place for part in found[1:]}
    else:
        data = None
        if search.in_data_layer:
            assert search.redirect is not None
            data = Data(NOT_YET, tuple(search.redirect[1:].split(b"/")))
        elif len(found) > 1:
            data = Data(layers[-1], found[-1].place)
        if tree.index is not None and top.st_nlink > 1:
            node, top = tree.index.enter(tree, parent, name, layers[0], top, data)
        else:
            if below is not None and below.st_nlink > 1:
                below = None
            elif below is None and layers[0] == UPPER and is_impure(tree, parent):
                below = origin_of(tree, tree.dir_fd(parent, UPPER), name, top)
            node = tree.enter(parent, name, layers[:1], top, below)
            if node.data is None:  # otherwise it is known under another of its names, and perhaps found already
                node.data = data
    if layers[0] == UPPER:
        node.redirect = search.upper_redirect
    return node, top
