"""A merged directory as a list that keeps its place."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from overt.overlay.listing import Entry, Listing, merge

NAMES = [b"n%d" % number for number in range(12)]


def entry(name: bytes, layer: int = 0, ino: int = 1) -> Entry:
    return Entry(ino, 8, name, layer)


@given(st.lists(st.dictionaries(st.sampled_from(NAMES), st.booleans()), max_size=5))
def test_a_names_first_layer_decides(layers: list[dict[bytes, bool]]) -> None:
    merged = merge(
        [(entry(name, number), whiteout) for name, whiteout in layer.items()] for number, layer in enumerate(layers)
    )
    expected = {}
    for number, layer in reversed(list(enumerate(layers))):
        for name, whiteout in layer.items():
            expected[name] = None if whiteout else number
    assert {found.name: found.layer for found in merged} == {
        name: at for name, at in expected.items() if at is not None
    }
    assert len(merged) == len({found.name for found in merged})


class ReadingWhileItChanges(RuleBasedStateMachine):
    """What was there all the time is read once; what is read was there at some time."""

    def __init__(self) -> None:
        super().__init__()
        self.there = dict.fromkeys(NAMES[:6], 1)
        self.listing = Listing(entry(name) for name in NAMES[:6])
        self.cookie = 0
        self.seen: list[bytes] = []
        self.stayed = set(self.there)
        self.ever = set(self.there)

    @rule(name=st.sampled_from(NAMES), ino=st.integers(1, 100))
    def add(self, name: bytes, ino: int) -> None:
        self.listing.add(entry(name, ino=ino))
        self.there[name] = ino
        self.ever.add(name)

    @rule(name=st.sampled_from(NAMES))
    def discard(self, name: bytes) -> None:
        self.listing.discard(name)
        self.there.pop(name, None)
        self.stayed.discard(name)

    @rule(count=st.integers(1, 4))
    def read(self, count: int) -> None:
        for cookie, found in self.listing.after(self.cookie):
            self.seen.append(found.name)
            self.cookie = cookie
            count -= 1
            if not count:
                break

    @rule()
    def read_to_the_end(self) -> None:
        for cookie, found in self.listing.after(self.cookie):
            self.seen.append(found.name)
            self.cookie = cookie
        assert self.stayed <= set(self.seen) <= self.ever
        assert all(self.seen.count(name) == 1 for name in self.stayed)
        self.cookie, self.seen = 0, []
        self.stayed = set(self.there)
        self.ever = set(self.there)

    @invariant()
    def knows_what_is_there(self) -> None:
        assert {found.name: found.ino for _, found in self.listing.after(0)} == self.there
        assert len(self.listing) == len(self.there)
        assert all((self.listing.get(name) is not None) == (name in self.there) for name in NAMES)


TestReadingWhileItChanges = ReadingWhileItChanges.TestCase


def test_a_cookie_beyond_the_end_is_the_end() -> None:
    assert list(Listing([entry(b"a")]).after(50)) == []
