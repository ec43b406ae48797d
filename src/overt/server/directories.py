"""Directory streams: OPENDIR, READDIR, READDIRPLUS, RELEASEDIR."""

import contextlib
import os
from collections.abc import Callable, Iterator

from overt.fuse.directory import DirBuffer
from overt.fuse.request import Request
from overt.host.files import getdents
from overt.overlay.listing import DT_DIR, Entry, Listing
from overt.server.mount import UNTIL_ASKED, Handle, Mount
from overt.tree import reading
from overt.tree.layer import UPPER
from overt.tree.node import Node
from overt.wire import fuse

Reply = bytes | memoryview | None

_DOTS = 2
"""cookies 1 and 2 follow ``.`` and ``..``"""
_one = bytearray(280)
"""room for one entry, which nobody looks at"""


def opendir(mount: Mount, request: Request) -> Reply:
    """OPENDIR: with a descriptor of the upper directory, so that fsync of this stream has a cursor of its own.

    A listing that the kernel keeps is dropped here, in the caller's time, and not by a notification: that waits for
    whoever is reading it, who may wait for us (a page fault on the buffer that he reads into).
    """
    tree = mount.tree
    node = tree.node(request.nodeid)
    fd = open_upper(mount, node) if node.layer == UPPER else -1
    handle = mount.new_handle(node, fd, request.arg[0])
    node.readers += 1
    keep = 0 if node.relisted else fuse.FOPEN_KEEP_CACHE
    node.relisted = False
    return mount.session.opened(request.unique, handle.fh, fuse.FOPEN_CACHE_DIR | keep)


def open_upper(mount: Mount, node: Node) -> int:
    """A descriptor of the upper part of a directory that can be flushed."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    return os.open(b".", flags, dir_fd=mount.tree.dir_fd(node, UPPER))


def releasedir(mount: Mount, request: Request) -> Reply:
    """RELEASEDIR."""
    handle = mount.open_handle(request.arg[0])
    del mount.handles[handle.fh]
    node = handle.node
    node.readers -= 1
    if not node.readers:
        mount.tree.kept.keep(node)
    if handle.fd >= 0:
        os.close(handle.fd)
    return mount.session.empty(request.unique)


def _listing(mount: Mount, handle: Handle, cookie: int) -> Listing:
    node = handle.node
    if node.listing is None:
        node.listing = reading.read(mount.tree, node)
    elif cookie == 0 and handle.fd >= 0:  # nobody reads the upper's directory, whose time of access is to say so
        with contextlib.suppress(OSError):
            getdents(handle.fd, _one)
    listing: Listing = node.listing
    return listing


def _entries(mount: Mount, handle: Handle, cookie: int) -> Iterator[tuple[int, Entry]]:
    """What follows `cookie`, up to where the directory ended when its reading began.

    Otherwise whoever renames what he reads would meet it again and again at the end, and never come to one.
    """
    listing = _listing(mount, handle, cookie)
    if cookie < _DOTS or handle.end < 0:
        handle.end = listing.end
    return listing.after(cookie - _DOTS, handle.end)


def readdir(mount: Mount, request: Request) -> Reply:
    """READDIR."""
    fh, cookie, size = request.arg[:3]
    tree = mount.tree
    handle = mount.open_handle(fh)
    node = handle.node
    buffer = DirBuffer(size)
    if cookie < _DOTS and not _add_dots(buffer.add, node, cookie):
        return mount.session.directory(request.unique, buffer)
    for after, entry in _entries(mount, handle, cookie):
        if not buffer.add(tree.listed_ino(node, entry), after + _DOTS, entry.kind, entry.name):
            break
    return mount.session.directory(request.unique, buffer)


def readdirplus(mount: Mount, request: Request) -> Reply:
    """READDIRPLUS: each entry with its attributes, and counted as looked up.

    What the kernel knows already goes without: it has the attributes, or asks for them when it needs them.
    """
    fh, cookie, size = request.arg[:3]
    tree = mount.tree
    handle = mount.open_handle(fh)
    node = handle.node
    buffer = DirBuffer(size)
    if cookie < _DOTS and not _add_dots(buffer.add_bare, node, cookie):
        return mount.session.directory(request.unique, buffer)
    for after, entry in _entries(mount, handle, cookie):
        name = entry.name
        known = node.children.get(name) if node.children is not None else None
        if known is not None and known.lookups:
            if not buffer.add_bare(known.ino, after + _DOTS, entry.kind, name):
                break
            continue
        try:
            found = tree.find(node, name)
        except OSError:  # the name is listed all the same, and whoever looks it up is told
            if not buffer.add_bare(tree.listed_ino(node, entry), after + _DOTS, entry.kind, name):
                break
            continue
        if found is None:
            continue  # a layer was changed behind our back
        child, st = found
        valid = UNTIL_ASKED if child.mappers else mount.forever
        if not buffer.add_plus(child.id, 0, valid, mount.attr(child, st), child.ino, after + _DOTS, entry.kind, name):
            tree.unused(child)
            break
        child.lookups += 1
    return mount.session.directory(request.unique, buffer)


def _add_dots(add: Callable[[int, int, int, bytes], bool], node: Node, cookie: int) -> bool:
    above = node.parent or node
    return (cookie >= 1 or add(node.ino, 1, DT_DIR, b".")) and add(above.ino, _DOTS, DT_DIR, b"..")
