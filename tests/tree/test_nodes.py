"""What is known of files while the kernel knows them, and forgotten after: without a mount, on real layers."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from overt.host import mounts
from overt.host.files import RENAME_EXCHANGE
from overt.tree import change, making, reading
from overt.tree.copyup import copy_up
from overt.tree.layer import DescriptorCache, Layer
from overt.tree.node import Node
from overt.tree.tree import Later, Tree

from .ground import Layers


@contextmanager
def tree_of(layers: Layers, limit: int = 1000) -> Iterator[Tree]:
    """A tree that nobody has mounted; when it is closed every descriptor is closed."""
    before = len(os.listdir("/proc/self/fd"))
    common = mounts.clone(str(layers.place))
    try:
        upper = os.open(f"/proc/self/fd/{common}/upper", os.O_PATH)
        work = os.open(f"/proc/self/fd/{common}/work", os.O_PATH)
        lowers = [mounts.clone(str(lower), attributes=Layer.LOWER) for lower in layers.lowers]
        found = [Layer(number, fd) for number, fd in enumerate([upper, *lowers])]
        tree = Tree(found, work, DescriptorCache(limit), sync="volatile")
        try:
            yield tree
        finally:
            tree.close()
    finally:
        os.close(common)
    assert len(os.listdir("/proc/self/fd")) == before


class Kernel:
    """Counts what it was told of, as the kernel does."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.counts: dict[int, int] = {}

    def told(self, node: Node) -> Node:
        node.lookups += 1
        self.counts[node.id] = self.counts.get(node.id, 0) + 1
        return node

    def look(self, path: str) -> Node:
        node = self.tree.root
        for name in os.fsencode(path).split(b"/"):
            node = self.told(self.tree.lookup(node, name)[0])
        return node

    def forget_everything(self) -> None:
        """In any order; nothing may be left but the root."""
        for number, count in self.counts.items():
            self.tree.forget(number, count)
            self.tree.cache.trim()
        assert list(self.tree.nodes.values()) == [self.tree.root]
        assert not self.tree.files
        assert not self.tree.root.children


def now(verb: Callable[[], object]) -> None:
    """Call what may have to wait for long work, and do that work."""
    while True:
        try:
            verb()
            return
        except Later as later:
            later.finish(later.work())


@pytest.fixture
def furnished(new_layers: Callable[..., Layers]) -> Layers:
    layers = new_layers(lowers=2)
    for layer in (layers.upper, *layers.lowers):
        (layer / "a" / "b").mkdir(parents=True)
        (layer / "a" / "b" / layer.name).write_text(layer.name)
        (layer / "a" / "same").write_text(layer.name)
    os.link(layers.upper / "a" / "same", layers.upper / "second")
    return layers


def test_nothing_is_left_of_what_the_kernel_forgot(furnished: Layers) -> None:
    with tree_of(furnished) as tree:
        kernel = Kernel(tree)
        for path in ("a/b/upper", "a/b/lower0", "a/b/lower1", "a/same", "second", "a/b"):
            kernel.look(path)
        assert kernel.look("second") is kernel.look("a/same"), "two names of one upper file are one node"
        kernel.forget_everything()


def test_a_number_is_never_used_again(furnished: Layers) -> None:
    with tree_of(furnished) as tree:
        seen: set[int] = set()
        for _ in range(5):
            kernel = Kernel(tree)
            node = kernel.look("a/b/lower0")
            assert node.id not in seen
            seen.add(node.id)
            kernel.forget_everything()
        with pytest.raises(OSError):
            tree.node(min(seen))


def test_names_that_change_leave_nothing_behind(furnished: Layers) -> None:
    with tree_of(furnished) as tree:
        kernel = Kernel(tree)
        a, b = kernel.look("a"), kernel.look("a/b")
        for path in ("a/b/lower0", "a/b/lower1", "a/same"):
            kernel.look(path)
        now(lambda: change.rename(tree, b, b"lower0", a, b"moved", 0))
        now(lambda: change.rename(tree, a, b"moved", a, b"same", RENAME_EXCHANGE))
        now(lambda: change.unlink(tree, b, b"lower1"))
        now(lambda: change.unlink(tree, a, b"same"))
        made = kernel.told(making.mkdir(tree, b, b"new", 0o755)[0])
        node, _, fd = making.create(tree, made, b"file", os.O_RDWR, 0o600)
        kernel.told(node)
        os.close(fd)
        making.link(tree, node, a, b"again")
        change.unlink(tree, made, b"file")
        change.unlink(tree, a, b"again")
        change.remove_dir(tree, b, b"new")
        nameless, _, fd = making.tmpfile(tree, a, os.O_RDWR, 0o600)
        kernel.told(nameless)
        os.close(fd)
        kernel.look("a/moved")
        kernel.forget_everything()


def test_few_descriptors_are_enough(furnished: Layers) -> None:
    """The cache of directory descriptors holds one; what is needed is opened again."""
    with tree_of(furnished, limit=1) as tree:
        kernel = Kernel(tree)
        for path in ("a/b/upper", "a/b/lower0", "a/b/lower1"):
            assert tree.stat(kernel.look(path)).st_size == len(path) - 4
            tree.cache.trim()
        now(lambda: copy_up(tree, kernel.look("a/b/lower1")))
        tree.cache.trim()
        assert sum(len(node.fds) for node in tree.nodes.values() if node is not tree.root) <= 1
        assert len(reading.read(tree, kernel.look("a/b"))) == 3
        kernel.forget_everything()


def test_a_file_that_got_a_new_number_is_forgotten_under_both(furnished: Layers) -> None:
    with tree_of(furnished) as tree:
        for new_first in (False, True):
            kernel = Kernel(tree)
            node = kernel.look("a/b/lower0")
            number = node.id
            tree.renumber(node)
            assert node.id != number
            assert tree.node(number) is tree.node(node.id) is node
            assert kernel.look("a/b/lower0") is node
            if new_first:
                kernel.counts = dict(reversed(kernel.counts.items()))
            kernel.forget_everything()
        assert tree.changed


def test_inode_numbers_of_removed_copies_are_given_back(furnished: Layers) -> None:
    with tree_of(furnished) as tree:
        kernel = Kernel(tree)
        node = kernel.look("a/b/lower0")
        number = node.ino
        now(lambda: copy_up(tree, node))
        assert node.ino == number
        assert list(tree.origins.values()) == [number]
        change.unlink(tree, kernel.look("a/b"), b"lower0")
        assert not tree.origins
        kernel.forget_everything()


def test_who_waits_for_work_that_is_under_way_lets_go_of_his_own(layers: Layers) -> None:
    """tree_of counts the descriptors."""
    for name in ("copied", "fetched"):
        (layers.lower / name).write_bytes(b"x" * (1 << 20))
    with tree_of(layers) as tree:
        tree.metacopy = True
        for name in (b"copied", b"fetched"):
            node, _ = tree.lookup(tree.root, name)
            if name == b"fetched":
                copy_up(tree, node)
            with pytest.raises(Later) as first:
                copy_up(tree, node, data=True)
            with pytest.raises(Later) as second:
                copy_up(tree, node, data=True)
            assert first.value.key == second.value.key
            second.value.abandon()
            first.value.finish(first.value.work())
            copy_up(tree, node, data=True)
            assert (layers.upper / os.fsdecode(name)).read_bytes() == b"x" * (1 << 20)
