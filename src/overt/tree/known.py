"""Which files the kernel knows, by number and by name."""

import errno
import os

from overt.tree.kept import Kept
from overt.tree.node import ROOT_ID, Node


class Known:
    """The nodes of one tree. A file that has several names in the upper is one node."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.files: dict[object, Node] = {}
        """nodes by what their file is in its layer: of files of the upper, and of hard links in the index"""
        self.kept = Kept()
        self.origins: dict[object, int] = {}
        """key of an upper file -> the inode number that the file had before it was copied up"""
        self.changed: list[int] = []
        """nodes whose attributes changed without the kernel knowing; the server tells it"""
        self.forgotten = 0
        """nodes that the kernel has forgotten, since the last `shrink`"""
        self._last_id = ROOT_ID

    # Numbers

    def node(self, number: int) -> Node:
        """The node of this number; ESTALE if there is none."""
        node = self.nodes.get(number)
        if node is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return node

    def forget(self, number: int, count: int) -> None:
        """The kernel gives back `count` references to a number."""
        node = self.nodes.get(number)
        if node is None:
            return
        if number != node.id and node.stale is not None:
            node.stale[number] -= count
            if node.stale[number] <= 0:
                del node.stale[number], self.nodes[number]
                self._drop_if_unknown(node)
            return
        node.lookups -= count
        self._drop_if_unknown(node)

    def unused(self, node: Node) -> None:
        """A node that was looked up but not given to the kernel."""
        self._drop_if_unknown(node)

    def renumber(self, node: Node) -> None:
        """Give the file a new number: what the kernel knows under the old one stays as it is (see server/data.py)."""
        if node.stale is None:
            node.stale = {}
        self.changed.append(node.id)
        node.stale[node.id] = node.lookups
        node.id = self.next_id()
        node.lookups = 0
        self.nodes[node.id] = node

    def touched(self, node: Node) -> None:
        """Attributes have changed by a request: what the kernel knows under another number is out of date."""
        if node.stale:
            self.changed.append(node.id)

    def _drop_if_unknown(self, node: Node) -> None:
        unknown = [node]
        while unknown:
            node = unknown.pop()
            if node.lookups > 0 or node.children or node.stale or node.parent is None:
                continue
            self.nodes.pop(node.id, None)
            for place, name in ((node.parent, node.name), *(node.links or ())):
                if place.children is not None and place.children.get(name) is node:
                    del place.children[name]
                    if not place.children:  # as large as it ever was, otherwise
                        place.children = None
                unknown.append(place)
            if node.key is not None and self.files.get(node.key) is node:
                del self.files[node.key]
            self.kept.forget(node)
            node.close()
            self.forgotten += 1

    def shrink(self) -> None:
        """Give back the room of what was forgotten: a dict that has lost its items stays as large as it was."""
        self.forgotten = 0
        self.nodes = dict(self.nodes)
        self.files = dict(self.files)

    def next_id(self) -> int:
        """A number for a new node."""
        self._last_id += 1
        return self._last_id

    # Names come and go

    def place(self, node: Node) -> tuple[Node, bytes]:
        """A directory of the merged tree in which the file is, and its name there."""
        if node.index is not None and node.links:
            return next(iter(node.links))
        assert node.parent is not None
        return node.parent, node.name

    def name(self, node: Node, parent: Node, name: bytes) -> None:
        """Note one more name of a node; the first name known after the last was lost becomes its place."""
        if parent.children is None:
            parent.children = {}
        parent.children[name] = node
        if node.anchor >= 0:
            os.close(node.anchor)
            node.anchor = -1
            node.parent, node.name = parent, name
        elif node.parent is not parent or node.name != name:
            if node.links is None:
                node.links = set()
            node.links.add((parent, name))

    def link_name(self, node: Node, parent: Node, name: bytes) -> None:
        """The file has got one more name."""
        self.touched(node)
        self.name(node, parent, name)

    def unname(self, node: Node, parent: Node, name: bytes, anchor: int) -> None:
        """The name is gone; `anchor` is what `hold` gave."""
        self.touched(node)
        if parent.children is not None and parent.children.get(name) is node:
            del parent.children[name]
        if node.links:
            if node.parent is parent and node.name == name:
                node.parent, node.name = node.links.pop()
            else:
                node.links.discard((parent, name))
        elif anchor >= 0:
            for fd in node.fds.values():
                os.close(fd)
            node.fds.clear()
            node.anchor = anchor
            if node.key in self.origins and not os.fstat(anchor).st_nlink:
                del self.origins[node.key]  # its inode number is free for another file when the anchor goes

    def move_name(self, node: Node, parent: Node, name: bytes, new_parent: Node, new_name: bytes) -> None:
        """The file has another name instead of this one."""
        if parent.children is not None and parent.children.get(name) is node:
            del parent.children[name]
        if node.parent is parent and node.name == name:
            node.parent, node.name = new_parent, new_name
        elif node.links:
            node.links.discard((parent, name))
            node.links.add((new_parent, new_name))
        if new_parent.children is None:
            new_parent.children = {}
        new_parent.children[new_name] = node
        self._drop_if_unknown(parent)
