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

    __slots__ = ("_entries", "_sizes")

    def __init__(self) -> None:
        self._sizes: dict[Node, int] = {}
        self._entries = 0

    def keep(self, node: Node) -> None:
        """Keep a directory's listing, or let it go if it is too large."""
        self.forget(node)
        size = len(node.listing) if node.listing is not None else 0
        if not size or size > _LARGEST or node.dropped:
            node.listing = None
            return
        self._sizes[node] = size
        self._entries += size
        while self._entries > _MOST:
            oldest = next(iter(self._sizes))
            self.forget(oldest)
            if not oldest.readers:
                oldest.listing = None

    def forget(self, node: Node) -> None:
        """The node is gone, or its listing is."""
        self._entries -= self._sizes.pop(node, 0)
