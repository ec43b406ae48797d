"""Overt beside the plain filesystem, kernel overlayfs and fuse-overlayfs: see overt.bench.run."""
