"""Files of the merged tree that the kernel knows by number.

A node is one file or directory; its number (nodeid) is never used again. It is found as a name in its parent's
directory, in the layer where it is; a bare inode number is never taken for an identity, except of files in the upper
while they are held. A file whose last known name goes away while the kernel still knows it is held by an O_PATH
descriptor, its *anchor*.
"""

import os
import stat
from typing import Any

ROOT_ID = 1


class Node:
    """A file of the merged tree. `layer` is where its attributes and data are; a directory has several `layers`."""

    __slots__ = (
        "anchor",
        "backing",
        "children",
        "data",
        "dropped",
        "fds",
        "filling",
        "handles",
        "id",
        "impure",
        "index",
        "ino",
        "key",
        "layer",
        "layers",
        "lingers",
        "links",
        "listing",
        "lookups",
        "mappers",
        "misses",
        "mode",
        "name",
        "parent",
        "places",
        "protection",
        "readers",
        "redirect",
        "refused",
        "relisted",
        "stale",
        "written",
        "xattrs",
    )  # fmt: skip

    def __init__(self, number: int, parent: "Node | None", name: bytes, layers: tuple[int, ...], mode: int, ino: int):
        self.id = number
        self.parent = parent
        self.name = name
        self.layers = layers
        self.layer = layers[0] if layers else -1
        self.mode = mode
        self.ino = ino
        self.lookups = 0
        self.anchor = -1
        self.key: object = None
        """what the tree's table of upper files has it under"""
        self.dropped = False
        """whether a file that only a lower layer has was removed while in use: it has no links any more"""
        self.places: dict[int, tuple[bytes, ...]] | None = None
        """layers in which the directory is not where its name says, and the names that lead there from the root"""
        self.redirect: bytes | None = None
        """what its mark in the upper says of that"""
        self.data: Any = None
        """where the data of a file is that has only attributes in its layer (overt.tree.data.Data)"""
        self.filling: Any = None
        """what the file is to have when its data, which is being fetched, has come (overt.tree.copyup.Filling)"""
        self.impure: bool | None = None
        """of a directory: whether files in its upper part may show another's inode number; None before it is asked"""
        self.protection: int | None = None
        """whether it is immutable or append-only (overt.tree.flags); None before it is asked"""
        self.index: Any = None
        """how many links a file has that is in the index, or will be when it is copied up (overt.tree.index.Links)"""
        self.children: dict[bytes, Node] | None = None
        self.fds: dict[int, int] = {}
        self.links: set[tuple[Node, bytes]] | None = None
        """further known names, beside `parent` and `name`"""
        self.stale: dict[int, int] | None = None
        """numbers that this file had before, and how often the kernel still counts them"""
        self.refused: dict[int, float] | None = None
        """threads that were sent to look the name up again, for the old number is open on a lower layer, and when"""
        self.listing: Any = None
        self.relisted = False
        """whether a name in this directory has got another inode number since the kernel began to keep its listing"""
        self.misses = 0
        """look-ups of this merged directory that had to ask its layers"""
        self.readers = 0
        """open directory streams"""
        self.handles: set[Any] | None = None
        """open files (the server's handles)"""
        self.backing: Any = None
        """what FUSE passthrough reads and writes, while some open file uses it"""
        self.mappers = 0
        """open files that may write without the kernel knowing what that does to the attributes"""
        self.lingers = False
        """whether one of them is closed, and still counts: what it mapped may be written to"""
        self.xattrs: frozenset[bytes] | None = None
        """names of xattrs, if they were listed: what is not among them is not there"""
        self.written = 0
        """the mtime, in nanoseconds, that the kernel was last given"""

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def merged(self) -> bool:
        """Whether it is a directory that more than one layer has."""
        return len(self.layers) > 1

    def __repr__(self) -> str:
        return f"<node {self.id} {os.fsdecode(self.name)!r} in {self.layers}>"

    def close(self) -> None:
        """Let go of the descriptors."""
        if self.anchor >= 0:
            os.close(self.anchor)
            self.anchor = -1
        while self.fds:  # one by one: the descriptor cache may be taking them out, too
            os.close(self.fds.popitem()[1])
