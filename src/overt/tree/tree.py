"""The merged tree: from a name to a node, and from a node to a file in a layer (fs/overlayfs/namei.c)."""

import errno
import os
import stat
from collections.abc import Callable, Iterable

from overt.overlay import marks, redirect
from overt.overlay.listing import DT_DIR, Entry
from overt.overlay.numbers import Numbers
from overt.overlay.owners import Owner
from overt.tree.copies import is_impure, origin_of
from overt.tree.data import open_data
from overt.tree.follow import discover
from overt.tree.handles import Handles
from overt.tree.index import Index
from overt.tree.known import Known
from overt.tree.layer import UPPER, DescriptorCache, Layer
from overt.tree.node import ROOT_ID, Node
from overt.tree.places import DIRECTORY, open_place

Work = Callable[[], object]
Finish = Callable[[object], None]

_O_ANCHOR = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_IFMT = 0o170000


class Later(Exception):
    """Raised by a verb that has to wait for long work: do `work` elsewhere, then `finish` here, then call the verb
    again.

    `key` names the work, so that two who wait for the same do it once: the second has to `abandon` his. `finish` gets
    what `work` returned or raised.
    """

    def __init__(self, key: object, work: Work, finish: Finish, abandon: Callable[[], None]) -> None:
        super().__init__(key)
        self.key = key
        self.work = work
        self.finish = finish
        self.abandon = abandon


class Tree(Known):
    """One overlay's layers and the nodes that the kernel knows. Used by one thread only."""

    whiteouts_are_files = False
    """whether lower layers may have whiteouts of another kind (overt.tree.images)"""

    def __init__(
        self,
        layers: Iterable[Layer],
        work: int,
        cache: DescriptorCache,
        *,
        sync: str = "auto",
        redirect_dir: str = redirect.FOLLOW,
        metacopy: bool = False,
        data: Iterable[Layer] = (),
        inline_copy: int = 1 << 18,
        index: int = -1,
    ) -> None:
        """`layers` uppermost first; `work` is the workdir's descriptor or -1 without an upper; `sync` is fsync=...

        `metacopy`: copy attributes up without the data; `data`: data-only layers, in which data alone is looked for.
        `index`: the descriptor of the index directory, or -1 for index=off.
        `inline_copy`: up to how many bytes a copy-up without an fsync is done at once, not by raising `Later`.
        """
        super().__init__()
        self.layers = {layer.index: layer for layer in layers}
        self.data = {layer.index: layer for layer in data}
        self.metacopy = metacopy
        for layer in self.layers.values():
            layer.attributes_only = metacopy or bool(self.data)
        self.name_max = os.fstatvfs(next(iter(self.layers.values())).root).f_namemax
        self.prefix = next(iter(self.layers.values())).prefix
        self.work = work
        self.cache = cache
        self.sync = sync
        self.follows = redirect_dir != redirect.NOFOLLOW
        self.redirects = redirect_dir == redirect.ON
        """whether a directory with a lower part can be renamed"""
        self.inline_copy = inline_copy
        self.prepared: dict[tuple[Node, int | None], object] = {}
        self.handles = Handles(self.layers.values(), nameless=index >= 0)
        self.index = Index(index) if index >= 0 else None
        self._temporary = 0
        indices = self.layers_of_root()
        devices = [layer.device for layer in (*(self.layers[index] for index in indices), *self.data.values())]
        self._number = Numbers(devices, upper=UPPER in self.layers).shown
        self.bottom = indices[-1]
        top = self.layers[indices[0]]
        self.root = Node(ROOT_ID, None, b".", indices, stat.S_IFDIR, self.ino(os.fstat(top.root)))
        self.root.lookups = 1
        self.root.fds = {index: layer.root for index, layer in self.layers.items()}
        self.nodes[ROOT_ID] = self.root

    def layers_of_root(self) -> tuple[int, ...]:
        """The layers that are merged in the root, which is all, uppermost first."""
        return tuple(sorted(self.layers))

    @property
    def writable(self) -> bool:
        """Whether there is an upper."""
        return UPPER in self.layers

    def close(self) -> None:
        """Close every descriptor, the layers' too."""
        self.root.fds = {}
        for node in list(self.nodes.values()):
            node.close()
        self.nodes.clear()
        for layer in (*self.layers.values(), *self.data.values()):
            layer.close()
        self.handles.close()
        if self.work >= 0:
            os.close(self.work)
        if self.index is not None:
            os.close(self.index.fd)

    # From a node to a file

    def dir_fd(self, node: Node, layer: int) -> int:
        """An O_PATH descriptor of directory `node` in `layer`; valid until the next `cache.trim`."""
        fd = node.fds.get(layer)
        if fd is not None:
            return fd
        chain = []
        while True:
            if node.anchor >= 0:
                fd = node.anchor
                break
            fd = node.fds.get(layer)
            if fd is not None:
                break
            if node.places is not None and layer in node.places:
                fd = open_place(self.layers[layer].root, node.places[layer])
                self.cache.hold(node.fds, layer, fd)
                break
            chain.append(node)
            assert node.parent is not None
            node = node.parent
        while chain:
            node = chain.pop()
            fd = os.open(node.name, DIRECTORY, dir_fd=fd)
            self.cache.hold(node.fds, layer, fd)
        return fd

    def at(self, node: Node) -> tuple[int, bytes]:
        """(directory descriptor, name) of a node that has a name."""
        if node.parent is None:
            return self.layers[node.layer].root, b"."
        parent = node.parent
        fd = parent.fds.get(node.layer)
        return (self.dir_fd(parent, node.layer) if fd is None else fd), node.name

    def stat(self, node: Node) -> os.stat_result:
        """lstat(2) of the file in its layer."""
        if node.anchor >= 0:
            return os.fstat(node.anchor)
        directory, name = self.at(node)
        return os.stat(name, dir_fd=directory, follow_symlinks=False)

    def path(self, node: Node) -> bytes:
        """A path for calls that take nothing else; the last component is not a link unless the file is one."""
        if node.anchor >= 0:
            return b"/proc/self/fd/%d" % node.anchor
        directory, name = self.at(node)
        return b"/proc/self/fd/%d/%b" % (directory, name)

    # What a tree that keeps owners elsewhere does otherwise (overt.tree.owners)

    def shown(self, node: Node, st: os.stat_result) -> os.stat_result:
        """What is to be shown of a file whose own attributes are `st`."""
        return st

    finishes = False
    """whether a new file lacks something when it is made, and must not be seen before it has that"""

    def finish(self, parent: Node, path: bytes, *, follow: bool = False) -> None:
        """Give a new file for `parent`, at `path` of the server's own, what it lacks; asked only if it `finishes`."""

    def chmod(self, node: Node, mode: int) -> None:
        """chmod(2)."""
        if node.anchor >= 0:
            os.chmod(self.path(node), mode)
        else:
            directory, name = self.at(node)
            os.chmod(name, mode, dir_fd=directory)

    def chown(self, node: Node, uid: int, gid: int) -> None:
        """lchown(2)."""
        if node.anchor >= 0:
            os.chown(self.path(node), uid, gid)
        else:
            directory, name = self.at(node)
            os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False)

    def notes(self, node: Node, st: os.stat_result) -> dict[bytes, bytes]:
        """xattrs that a copy of a file, which is `st`, is to have beside those of the file."""
        return {}

    def own(self, st: os.stat_result) -> Owner:
        """The owner and mode that a copy of a file, which is `st`, is to have; any thread."""
        return Owner(st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode))

    def carried(self, layer: int) -> Callable[[bytes], bytes | None]:
        """How a copy of a layer's file calls the file's xattrs, None for those that stay behind; for any thread."""
        return lambda xattr: None if marks.shown(self.prefix, xattr) is None else xattr

    def stored_xattr(self, node: Node, name: bytes) -> bytes:
        """The name that a file's layer has for what users call `name`."""
        return marks.stored(self.prefix, name)

    def shown_xattr(self, node: Node, name: bytes) -> bytes | None:
        """What users call an xattr of a file's layer; None for what is not theirs."""
        return marks.shown(self.prefix, name)

    def name_of(self, node: Node) -> str:
        """The file's path in the overlay, for people."""
        parts = []
        while node.parent is not None:
            parent, name = self.place(node)
            if self.index is not None and parent is self.index.place:
                return f"(a hard link of which no name is known, {os.fsdecode(name)} in the index)"
            parts.append(os.fsdecode(name))
            node = parent
        return "/" + "/".join(reversed(parts))

    def open(self, node: Node, flags: int) -> int:
        """Open the file where its data is. Whatever has taken its place behind our back, we do not wait for it."""
        if node.data is not None:
            return open_data(self, node, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        return self.open_own(node, flags)

    def open_own(self, node: Node, flags: int) -> int:
        """Open the file where its attributes are."""
        flags |= os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        if node.anchor >= 0:
            return os.open(b"/proc/self/fd/%d" % node.anchor, flags)
        directory, name = self.at(node)
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=directory)

    def ino(self, st: os.stat_result) -> int:
        """The inode number to show: the file's own, marked with its device where layers are on several."""
        return self._number(st.st_dev, st.st_ino)

    def listed_ino(self, directory: Node, entry: Entry) -> int:
        """The inode number to show beside a name in a listing."""
        child = directory.children.get(entry.name) if directory.children else None
        if child is not None:
            return child.ino
        if entry.layer == UPPER and (is_impure(self, directory) or (entry.kind == DT_DIR and directory.merged)):
            try:
                found = self.find(directory, entry.name)
            except OSError:  # the name is listed all the same, and whoever looks it up is told
                found = None
            if found is not None:
                self.unused(found[0])
                return found[0].ino
        return self._number(self.layers[entry.layer].device, entry.ino)

    # From a name to a node

    def lookup(self, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
        """The node that `name` is in directory `parent`, and its attributes; FileNotFoundError without one."""
        found = self.find(parent, name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return found

    def find(self, parent: Node, name: bytes) -> tuple[Node, os.stat_result] | None:
        """The node that `name` is in directory `parent`, and its attributes; None without one."""
        children = parent.children
        if children is not None:
            child = children.get(name)
            if child is not None:
                try:
                    if (child.parent is parent and child.name == name) or child.index is not None:
                        return child, self.stat(child)
                    fd = self.dir_fd(parent, child.layer)
                    return child, os.stat(name, dir_fd=fd, follow_symlinks=False)
                except FileNotFoundError:
                    del children[name]  # a layer was changed behind our back; look again
        listing = parent.listing
        if listing is None:
            parent.misses += len(parent.layers) > 1
            return self._discover(parent, name, UPPER)
        entry = listing.get(name)
        if entry is not None:
            return self._discover(parent, name, entry.layer)
        if len(name) > self.name_max:  # no layer was asked, which would have said so
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        return None

    def _discover(self, parent: Node, name: bytes, start: int) -> tuple[Node, os.stat_result] | None:
        found: list[int] = []
        top = second = None
        for layer in parent.layers:
            if layer < start:
                continue
            directory = parent.fds.get(layer)
            if directory is None:
                directory = self.dir_fd(parent, layer)
            try:
                st = os.stat(name, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                continue
            kind = st.st_mode & _IFMT
            if kind != stat.S_IFDIR:
                here = self.layers[layer]
                may_be_whiteout = kind == stat.S_IFCHR or here.xattr_whiteouts
                if top is None and not (may_be_whiteout and self.is_whiteout(layer, directory, name, st)):
                    if kind == stat.S_IFREG and here.lacks_data(directory, name, st):
                        return discover(self, parent, name)
                    top = st
                    found.append(layer)
                    if layer == UPPER and parent.impure is not False and is_impure(self, parent):
                        second = origin_of(self, directory, name, st)
                break
            found.append(layer)
            if top is None:
                top = st
            elif second is None:
                second = st
            if layer != self.bottom:
                below = self.layers[layer].below(directory, name)
                if below == marks.HIDES:
                    break
                if below == marks.ELSEWHERE:
                    return discover(self, parent, name)
        if top is None:
            return None
        if self.index is not None and top.st_nlink > 1 and top.st_mode & _IFMT != stat.S_IFDIR:
            return self.index.enter(self, parent, name, found[0], top)
        return self.enter(parent, name, tuple(found), top, second if found[0] == UPPER else None), top

    def is_mark(self, layer: int, name: bytes) -> bool:
        """Whether a name of the layer is never shown; asked only if `whiteouts_are_files`, and so are these two."""
        return False

    def is_gone(self, layer: int, directory: int, name: bytes) -> bool:
        """Whether another file of the layer says that the name is gone from the layers below."""
        return False

    def hides(self, layer: int, directory: int, name: bytes) -> bool:
        """Whether a file in a directory of the layer says that it hides what is below."""
        return False

    def is_whiteout(self, layer: int, directory: int, name: bytes, st: os.stat_result) -> bool:
        """Whether a file of a layer says that the name is gone."""
        if marks.is_whiteout(st.st_mode, st.st_rdev):
            return True
        return self.layers[layer].is_xattr_whiteout(directory, name, st)

    def enter(
        self,
        parent: Node,
        name: bytes,
        layers: tuple[int, ...],
        st: os.stat_result,
        below: os.stat_result | None = None,
    ) -> Node:
        """The node for a file found or made as `name`; one that is known under another name of the upper is that one.

        `below` is the lower directory that one in the upper is merged with, or the file that it is a copy of: its inode
        number is shown, so that a copy-up changes nothing.
        """
        is_upper_file = layers[0] == UPPER and st.st_mode & _IFMT != stat.S_IFDIR
        if is_upper_file:
            key = self.key_of(st)
            node = self.files.get(key)
            if node is not None:
                self.name(node, parent, name)
                return node
            ino = self.ino(below or st)
            if below is not None:
                self.origins[key] = ino
            elif self.origins:
                ino = self.origins.get(key, ino)
        else:
            ino = self.ino(below or st)
        node = Node(self.next_id(), parent, name, layers, st.st_mode, ino)
        self.nodes[node.id] = node
        if parent.children is None:
            parent.children = {}
        parent.children[name] = node
        if is_upper_file:
            node.key = key
            self.files[key] = node
        return node

    def enter_nameless(self, st: os.stat_result, anchor: int) -> Node:
        """The node of a file without a name (O_TMPFILE), held by `anchor`."""
        node = Node(self.next_id(), self.root, b"", (UPPER,), st.st_mode, self.ino(st))
        node.anchor = anchor
        self.nodes[node.id] = node
        node.key = self.key_of(st)
        self.files[node.key] = node
        return node

    def key_of(self, st: os.stat_result) -> object:
        """What the table of upper files has a file under."""
        return st.st_ino if st.st_dev == self.layers[UPPER].device else (st.st_dev, st.st_ino)

    def in_upper(self, node: Node, st: os.stat_result, *, broken: bool = False) -> None:
        """Note that a file was copied up and is `st` in the upper.

        `broken`: it has other names in the lower layer, and they stay there.
        """
        if node.parent is not None and node.anchor < 0:
            if broken:
                node.parent.relisted = True
            entry = node.parent.listing.get(node.name) if node.parent.listing is not None else None
            if entry is not None:
                ino = st.st_ino if broken else entry.ino
                node.parent.listing.add(entry._replace(layer=UPPER, ino=ino))
        if node.is_dir:
            node.layers = (UPPER, *node.layers)
            node.impure = False
        else:
            node.layers = (UPPER,)
            self.files.pop(node.key, None)
            node.key = self.key_of(st)
            self.files[node.key] = node
            if broken:  # the other names of the lower file keep its number, and this is another file from here on
                node.ino = self.ino(st)
            elif node.ino != self.ino(st):
                self.origins[node.key] = node.ino
        node.layer = UPPER
        node.xattrs = None

    def hold(self, node: Node, parent: Node, name: bytes) -> int:
        """Open the anchor that a node needs before its name goes, or -1 where another of its names is known."""
        if node.anchor >= 0 or node.parent is not parent or node.name != name or node.links:
            return -1
        directory, known = self.at(node)
        return os.open(known, _O_ANCHOR, dir_fd=directory)

    def replaced(self, node: Node) -> None:
        """The upper has another directory in the place of `node`'s, and nothing below it shows any more."""
        for fd in node.fds.values():
            os.close(fd)
        node.fds.clear()
        node.layers = (UPPER,)
        node.places = node.redirect = None
        node.impure = False

    def temporary(self) -> bytes:
        """A name for use in the work directory, in overlayfs's manner."""
        self._temporary += 1
        return b"#%x" % self._temporary
