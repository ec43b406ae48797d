"""Overlay's decisions carried out on directory descriptors.

Nothing here builds a path from the layer's root: every file is reached as one name in one directory descriptor, so
names of 255 bytes and trees deeper than PATH_MAX work, and a symlink or ``..`` in a hostile layer leads nowhere.
"""
