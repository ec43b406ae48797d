"""Names: LOOKUP, FORGET, and what makes, removes and moves them."""

import os

from overt.fuse.request import Request
from overt.server import identity
from overt.server.data import tidy
from overt.server.mount import Mount
from overt.tree import change, making, reading

Reply = bytes | memoryview | None


def lookup(mount: Mount, request: Request) -> Reply:
    """LOOKUP; that a name is missing is remembered too. ``.`` and ``..`` are asked by open_by_handle_at."""
    parent = mount.tree.node(request.nodeid)
    name = request.name
    if name == b"." or name == b"..":
        node = parent if name == b"." else parent.parent or parent
        return mount.entry(request, node, mount.tree.stat(node))
    found = mount.tree.find(parent, name)
    if parent.misses:
        reading.index_if_busy(mount.tree, parent)
    if found is None:
        return mount.session.negative(request.unique, mount.forever)
    return mount.entry(request, *found)


def forget(mount: Mount, request: Request) -> Reply:
    """FORGET and BATCH_FORGET."""
    for number, count in request.arg:
        mount.tree.forget(number, count)
    return None


def interrupt(mount: Mount, request: Request) -> Reply:
    """INTERRUPT."""
    mount.interrupt(request.arg[0])
    return None


def mkdir(mount: Mount, request: Request) -> Reply:
    """MKDIR."""
    mode, umask = request.arg
    mount.become(request, umask)
    return mount.entry(request, *making.mkdir(mount.tree, mount.tree.node(request.nodeid), request.name, mode))


def mknod(mount: Mount, request: Request) -> Reply:
    """MKNOD."""
    mode, rdev, umask = request.arg[:3]
    mount.become(request, umask)
    return mount.entry(request, *making.mknod(mount.tree, mount.tree.node(request.nodeid), request.name, mode, rdev))


def symlink(mount: Mount, request: Request) -> Reply:
    """SYMLINK."""
    mount.become(request, 0)
    parent = mount.tree.node(request.nodeid)
    return mount.entry(request, *making.symlink(mount.tree, parent, request.name, request.name2))


def link(mount: Mount, request: Request) -> Reply:
    """LINK."""
    identity.become_root()
    node = mount.tree.node(request.arg[0])
    st = making.link(mount.tree, node, mount.tree.node(request.nodeid), request.name)
    return mount.entry(request, node, st)


def unlink(mount: Mount, request: Request) -> Reply:
    """UNLINK."""
    identity.become_root()
    change.unlink(mount.tree, mount.tree.node(request.nodeid), request.name)
    if mount.released:  # who removes a file to make room wants the room now
        tidy(mount)
    return mount.session.empty(request.unique)


def rmdir(mount: Mount, request: Request) -> Reply:
    """RMDIR."""
    identity.become_root()
    change.remove_dir(mount.tree, mount.tree.node(request.nodeid), request.name)
    return mount.session.empty(request.unique)


def rename(mount: Mount, request: Request) -> Reply:
    """RENAME and RENAME2."""
    identity.become_root()
    tree = mount.tree
    flags = request.arg[1] if len(request.arg) > 1 else 0
    change.rename(tree, tree.node(request.nodeid), request.name, tree.node(request.arg[0]), request.name2, flags)
    return mount.session.empty(request.unique)


def readlink(mount: Mount, request: Request) -> Reply:
    """READLINK."""
    node = mount.tree.node(request.nodeid)
    if node.anchor >= 0:
        return mount.session.data(request.unique, os.readlink(b"", dir_fd=node.anchor))
    directory, name = mount.tree.at(node)
    return mount.session.data(request.unique, os.readlink(name, dir_fd=directory))
