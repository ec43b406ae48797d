"""Listings that stay when their last reader has gone.

A look-up that a listing answers asks no layer: otherwise each costs a stat in every layer above the one that has the
name, and one for a missing name asks them all. Only this process changes the upper, and lower layers do not change, so
a listing that is kept up to date is as true as the layers.
"""

from overt.tree.node import Node

_LARGEST = 10_000
_MOST = 200_000


class Kept:
    """The kept listings of one tree; the oldest go when there are too many entries."""

    __slots__ = ("_entries", "_nodes")

    def __init__(self) -> None:
        self._nodes: dict[Node, None] = {}
        self._entries = 0

    def keep(self, node: Node) -> None:
        """Keep a directory's listing, or let it go if it is too large."""
        self.forget(node)
        if node.listing is None:
            return
        if len(node.listing) > _LARGEST or node.dropped:
            node.listing = None
            return
        self._nodes[node] = None
        self._entries += len(node.listing)
        self._make_room()

    def changed(self, node: Node, by: int) -> None:
        """A kept listing has `by` more entries."""
        if node in self._nodes:
            self._entries += by
            if by > 0:
                self._make_room()

    def forget(self, node: Node) -> None:
        """The node is gone, or its listing is about to be."""
        if node in self._nodes:
            del self._nodes[node]
            self._entries -= len(node.listing)

    def _make_room(self) -> None:
        while self._entries > _MOST:
            oldest = next(iter(self._nodes))
            self.forget(oldest)
            if not oldest.readers:
                oldest.listing = None
