"""Whiteouts that are files, in one layer's entries."""

from hypothesis import given
from hypothesis import strategies as st

from overt.overlay.images import read
from overt.overlay.listing import Entry, merge

names = st.lists(
    st.sampled_from([b"a", b"b", b".wh.a", b".wh.b", b".wh..wh..opq", b".wh.", b".wh..wh.a", b".whatever"]), unique=True
)


@given(st.lists(names, min_size=1, max_size=3))
def test_a_name_is_gone_from_below_the_layer_of_its_whiteout(layers: list[list[bytes]]) -> None:
    made = [[(Entry(1, 8, name, number), False) for name in layer] for number, layer in enumerate(layers)]
    shown = {entry.name: entry.layer for entry in merge(read(layer) for layer in made)}
    for name in (b"a", b"b", b".whatever"):
        expected = None
        for number, layer in enumerate(layers):
            if name in layer:
                expected = number
                break
            if b".wh." + name in layer:
                break
        assert shown.get(name) == expected
    assert all(not name.startswith(b".wh.") for name in shown)
