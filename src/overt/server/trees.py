"""Which kind of tree serves a mount: those that pay for nothing they were not asked for."""

from overt.overlay.options import Options
from overt.server.layers import Layers, Refusal
from overt.tree.images import ImageTree
from overt.tree.layer import DescriptorCache
from overt.tree.owners import OwnersImageTree, OwnersTree, kinds_of
from overt.tree.tree import Tree


def make_tree(options: Options, layers: Layers, cache: DescriptorCache, index: int) -> Tree:
    """The tree of a mount; raise `Refusal` where owners are to be in xattrs and the upper cannot have them."""
    kind = ImageTree if options.whiteout_files else Tree
    if options.view.permissions:
        kind = OwnersImageTree if options.whiteout_files else OwnersTree
    tree = kind(
        layers.layers, layers.work, cache, sync=options.fsync, redirect_dir=options.redirect_dir,
        metacopy=options.metacopy, data=layers.data, index=index,
    )  # fmt: skip
    if isinstance(tree, OwnersTree):
        try:
            tree.kinds = kinds_of(layers.layers, options.view.permissions)
        except OSError as error:
            raise Refusal(f"xattr_permissions={options.view.permissions}: {error.strerror}") from None
    return tree
