"""Inode numbers that are unique over layers on several filesystems (ovl_map_dev_ino, xino=on).

The high bits say which filesystem a number is of; how many they are follows from how many there are, as in the kernel,
so that a file has the same number in both. A number that is too large for the rest, or is of a filesystem that was not
known at the mount (a btrfs subvolume inside a layer), gets one of its own that is good while the mount lives; the
lowest of the high bits keeps these apart.
"""

from collections.abc import Sequence

_BITS = 64


class Numbers:
    """The inode numbers of one overlay; a filesystem goes by its st_dev."""

    __slots__ = ("_bases", "_others", "_reserved", "bits")

    def __init__(self, devices: Sequence[int], *, upper: bool) -> None:
        """`devices`: of each layer, uppermost first; `upper`: whether the first of them is an upper's."""
        known = dict.fromkeys(devices)
        first = 0 if upper else 1  # the kernel keeps 0 for an upper's
        last = first + len(known) - 1
        high = last.bit_length() + 1 if len(known) > 1 else 0
        self.bits = _BITS - high
        """how many bits a filesystem's own number may have"""
        self._bases = {device: (first + n) << self.bits + 1 if high else 0 for n, device in enumerate(known)}
        self._reserved = 1 << min(self.bits, _BITS - 1)
        self._others: dict[tuple[int, int], int] = {}

    def shown(self, device: int, number: int) -> int:
        """The number to show for `number` on `device`."""
        base = self._bases.get(device)
        if base is None or number >> self.bits:
            return self._reserved | self._others.setdefault((device, number), len(self._others) + 1)
        return number | base
