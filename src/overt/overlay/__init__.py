"""The merged tree's decisions, without I/O: what is merged, what is hidden, what is written down on disk.

The format is kernel overlayfs's own (Documentation/filesystems/overlayfs.rst, fs/overlayfs/), so that layers written
here mount there and the other way round.
"""
