"""overt and the kernel's overlayfs over equal layers: the same operations have the same results, and leave uppers that
the other one mounts and shows as the same tree."""

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .ground import Ground, Layers
from .twins import Operation, Twin, build, everything, layer, listed_otherwise, operations, resolve

_SETTINGS = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    max_examples=30,
    database=None,
    phases=(Phase.generate,),
)
_given = given(
    lowers=st.lists(layer, min_size=1, max_size=3),
    upper=st.one_of(st.just([]), layer),
    doing=st.lists(operations, min_size=12, max_size=40),
)


def compare(
    ground: Ground, options: str, features: str, lowers: list[Any], upper: list[Any], doing: list[Operation]
) -> None:
    """Do half of it on both, and look at everything; exchange them, put a new upper on each, and do the rest.

    No new upper on an index: which names a copy has in an upper is up to who made it (docs/decisions/0014), and without
    the index they are all there is.
    """
    ours, theirs = (Layers(ground, lowers=len(lowers), options=options, features=features) for _ in range(2))
    try:
        for layers in (ours, theirs):
            roots = [layers.upper, *layers.lowers]
            for number, tree in reversed(list(enumerate([upper, *lowers]))):
                build(roots[number], tree, roots[number + 1 :])
        half = len(doing) // 2
        compare_on(ours, theirs, doing[:half])
        if "index=on" not in features:
            for layers in (ours, theirs):
                layers.stack()
        compare_on(theirs, ours, doing[half:])
    finally:
        ours.close()
        theirs.close()


def compare_on(ours: Layers, theirs: Layers, doing: list[Operation]) -> None:
    """The same on layers that overt mounts and on ones that the kernel mounts; then each is shown to the other."""
    touches = "metacopy=on" in ours.features
    mine = Twin(ours.mount(), ours.lowers, touches=touches)
    with theirs.kernel() as path:
        its = Twin(path, theirs.lowers, touches=touches)
        try:
            assert everything(mine) == everything(its)
            for operation in doing:
                operation = resolve(operation, its.root)
                result, expected = mine.perform(operation), its.perform(operation)
                if expected in ("EEXIST", "ENOTDIR") and operation[0] in ("fdchmod", "fdstat", "fdtruncate"):
                    # The kernel tries to copy up an open file that a rename has replaced to the name that it had.
                    for twin in (mine, its):
                        twin.do_close(operation[2])
                    continue
                assert result == expected, operation
            last = everything(its)
            assert everything(mine) == last
        finally:
            mine.close()
            its.close()
    with ours.kernel() as path:
        assert everything(Twin(path, ours.lowers)) == last
    path = theirs.mount()
    assert not listed_otherwise(path)
    assert everything(Twin(path, theirs.lowers)) == last
    theirs.umount()


FEATURES = {
    "plain": "", "redirects": "redirect_dir=on", "metacopy": "metacopy=on", "index": "index=on",
    "all": "index=on,metacopy=on",
}  # fmt: skip


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("options", ["", "nopassthrough"], ids=["passthrough", "nopassthrough"])
def test_same_operations_same_tree(ground: Ground, quiet: None, options: str, features: str) -> None:
    @_SETTINGS
    @_given
    def run(lowers: list[Any], upper: list[Any], doing: list[Operation]) -> None:
        compare(ground, options, features, lowers, upper, doing)

    run()


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("options", ["", "nopassthrough", "volatile"], ids=["passthrough", "nopassthrough", "volatile"])
def test_same_operations_same_tree_many_times(ground: Ground, quiet: None, options: str, features: str) -> None:
    @settings(_SETTINGS, max_examples=1500, phases=(Phase.generate, Phase.shrink))
    @_given
    def run(lowers: list[Any], upper: list[Any], doing: list[Operation]) -> None:
        compare(ground, options, features, lowers, upper, doing)

    run()
