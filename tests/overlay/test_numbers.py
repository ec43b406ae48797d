"""Inode numbers over several filesystems."""

from hypothesis import given
from hypothesis import strategies as st

from overt.overlay.numbers import Numbers

devices = st.lists(st.integers(0, 9), min_size=1, max_size=6)
files = st.tuples(st.integers(0, 12), st.one_of(st.integers(1, 2**64 - 1), st.integers(1, 100)))


@given(devices, st.booleans(), st.sets(files, max_size=30))
def test_each_file_has_a_number_and_no_two_have_the_same(
    devices: list[int], upper: bool, files: set[tuple[int, int]]
) -> None:
    if len(set(devices)) == 1:  # all are that filesystem's own then, and it has no high bits to spare
        files = {(device, number) for device, number in files if number < 2**63}
    numbers = Numbers(devices, upper=upper)
    shown = {file: numbers.shown(*file) for file in files}
    assert len(set(shown.values())) == len(files)
    assert all(0 < number < 2**64 for number in shown.values())
    assert {file: numbers.shown(*file) for file in files} == shown


def test_on_one_filesystem_they_are_its_own() -> None:
    numbers = Numbers([7, 7, 7], upper=True)
    assert [numbers.shown(7, number) for number in (1, 2**32, 2**64 - 1)] == [1, 2**32, 2**64 - 1]


def test_the_kernels_high_bits() -> None:
    """Of two filesystems two bits, the lower of which is for numbers that do not fit; an upper's have none of them."""
    two = Numbers([1, 2, 1, 2], upper=True)
    assert (two.shown(1, 5), two.shown(2, 5)) == (5, 1 << 63 | 5)
    assert two.shown(2, 1 << 62) == 1 << 62 | 1
    three = Numbers([1, 2, 3], upper=True)
    assert (three.shown(2, 5), three.shown(3, 5)) == (1 << 62 | 5, 2 << 62 | 5)
    lower = Numbers([1, 2], upper=False)
    assert (lower.shown(1, 5), lower.shown(2, 5)) == (1 << 62 | 5, 2 << 62 | 5)
