"""overt and the kernel's overlayfs over equal layers: the same operations have the same results, and leave uppers that
the other one mounts and shows as the same tree."""

import errno
import os
import stat
from contextlib import nullcontext
from pathlib import Path
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
        for layers in (ours, theirs):
            if "index=on" in features:
                layers.forget_volatile()
            else:
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
                if operation[0] in ("fdchmod", "fdstat") and is_removed_below(mine, its, operation[2]):
                    compare_removed(mine, its, operation)
                    continue
                result, expected = mine.perform(operation), its.perform(operation)
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


def is_removed_below(mine: Twin, its: Twin, slot: int) -> bool:
    """Whether a file that was open on a lower layer when its name went is open there.

    The kernel counts the links of the lower file.
    """
    if slot not in mine.open:
        return False
    return os.fstat(mine.open[slot]).st_nlink == 0 and os.fstat(its.open[slot]).st_nlink > 0


def compare_removed(mine: Twin, its: Twin, operation: Operation) -> None:
    """What differs there, as REMOVED has it."""
    folder = stat.S_ISDIR(os.fstat(mine.open[operation[2]]).st_mode)
    if operation[0] == "fdstat":
        result, expected = mine.perform(operation), its.perform(operation)
        assert result == (expected if folder else (*expected[:6], 0, *expected[7:])), operation
        return
    if not folder:
        result, expected = mine.perform(operation), its.perform(operation)
        assert (result, expected) in ((None, "EEXIST"), (None, "ENOENT"), ("EPERM", "EPERM")), operation
    for twin in (mine, its):  # of a directory the kernel would change another one, that has taken its place
        twin.do_close(operation[2])


REMOVED = {
    ("file", "nothing"): "EEXIST", ("file", "file"): "EEXIST", ("file", "directory"): "EEXIST",
    ("file", "parent"): "ENOENT", ("file", "another parent"): "ENOENT",
    ("directory", "nothing"): "ENOTDIR", ("directory", "file"): "ENOTDIR", ("directory", "directory"): None,
    ("directory", "full directory"): "ENOTEMPTY", ("directory", "parent"): "EIO",
    ("directory", "another parent"): "EIO",
}  # fmt: skip
"""What the kernel says to fchmod(2) of an open lower file that was removed, by what has taken its place.

It copies it up to the name that it had (ovl_copy_up_one): a file is linked there, a directory renamed, whatever is
there now; and where the parent is gone there is no such place. overt changes a file that has no name, and has no
such directory (ESTALE).
"""


@pytest.mark.parametrize(("kind", "instead"), REMOVED, ids="-".join)
def test_an_open_file_of_a_lower_layer_that_was_removed(ground: Ground, quiet: None, kind: str, instead: str) -> None:
    results = []
    for by in ("overt", "kernel"):
        layers = Layers(ground)
        try:
            (layers.lower / "parent").mkdir()
            name = layers.lower / "parent" / "name"
            name.mkdir() if kind == "directory" else name.write_text("text")
            with nullcontext(layers.mount()) if by == "overt" else layers.kernel() as root:
                results.append(fchmod_removed(root / "parent" / "name", instead))
        finally:
            layers.close()
    ours = (0, "ESTALE" if kind == "directory" else None)
    assert results == [ours, (2 if kind == "directory" else 1, REMOVED[kind, instead])]


def fchmod_removed(path: Path, instead: str) -> tuple[int, str | None]:
    """(links, errno of fchmod) of what was at `path` and is open."""
    fd = os.open(path, os.O_RDONLY)
    try:
        path.rmdir() if path.is_dir() else path.unlink()
        if "parent" in instead:
            path.parent.rmdir()
            if instead == "another parent":
                path.parent.mkdir()
        elif "directory" in instead:
            path.mkdir()
            if instead.startswith("full"):
                (path / "child").touch()
        elif instead == "file":
            path.touch()
        links = os.fstat(fd).st_nlink
        try:
            os.fchmod(fd, 0o700)
        except OSError as error:
            return links, errno.errorcode[error.errno or 0]
        return links, None
    finally:
        os.close(fd)


XATTRS = (
    "user.one", "user.none", "user.", "trusted.two", "trusted.none", "trusted.overlay.opaque", "security.none",
    "security.", "system.posix_acl_access", "system.posix_acl_default", "system.nfs4_acl", "system.none",
    "btrfs.compression", "foo.x", "foo",
)  # fmt: skip


def test_an_xattr_that_is_not_there_and_one_that_cannot_be(ground: Ground, quiet: None) -> None:
    results = []
    for by in ("overt", "kernel"):
        layers = Layers(ground)
        try:
            for layer in (layers.lower, layers.upper):
                for path in (layer / f"{layer.name}-file", layer / f"{layer.name}-dir"):
                    path.mkdir() if "dir" in path.name else path.touch()
                    os.setxattr(path, "user.one", b"1")
                    os.setxattr(path, "trusted.two", b"2")
                os.symlink("none", layer / f"{layer.name}-link")
            with nullcontext(layers.mount()) if by == "overt" else layers.kernel() as root:
                results.append({(path.name, name): xattr(path, name) for path in root.iterdir() for name in XATTRS})
        finally:
            layers.close()
    assert results[0] == results[1]
    assert set(results[0].values()) == {b"1", b"2", *map(os.strerror, (errno.ENODATA, errno.EOPNOTSUPP, errno.EINVAL))}


def xattr(path: Path, name: str) -> bytes | str:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError as error:
        return os.strerror(error.errno or 0)


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
