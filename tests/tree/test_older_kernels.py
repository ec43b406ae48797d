"""What a kernel before this one would send: requests by hand, on real layers."""

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from overt.events import Events
from overt.overlay.options import parse
from overt.server.handlers import TABLE
from overt.server.mount import Mount
from overt.server.pool import Pool
from overt.tree.node import Node
from overt.wire import fuse
from overt.wire.record import pack, struct_of

from .ground import Layers
from .test_nodes import tree_of

_OUT = struct_of(fuse.OutHeader)


class Kernel:
    """One that is as old as `minor` of the protocol."""

    def __init__(self, mount: Mount, end: socket.socket, minor: int) -> None:
        self._mount = mount
        self._end = end
        self._unique = 0
        assert self.ask(fuse.FUSE_INIT, fuse.InitIn(7, minor, 0, 0xFFFFFFFF & ~fuse.FUSE_INIT_EXT, 0), 0) == 0

    def ask(self, opcode: int, record: tuple[int, ...], nodeid: int) -> int:
        """The errno of the answer."""
        self._unique += 2
        body = pack(record)  # type: ignore[type-var]
        head = fuse.InHeader(40 + len(body), opcode, self._unique, nodeid, 0, 0, os.getpid(), 0)
        request = bytearray(pack(head) + body)
        self._mount.handle(request, len(request))
        unique = 0
        while not unique:  # a notification
            reply = self._end.recv(1 << 16)
            length, code, unique = _OUT.unpack_from(reply)
            assert length == len(reply)
        assert unique == self._unique
        return -code


@contextmanager
def served(layers: Layers, minor: int) -> Iterator[tuple[Kernel, Mount]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, tree_of(layers) as tree:
        events = Events(foreground=True)
        mount = Mount(theirs.fileno(), "/mnt", parse(layers.words), tree, None, None, None, Pool(1, "x"), events)  # type: ignore[arg-type]
        mount.handlers = TABLE
        yield Kernel(mount, ours, minor), mount


def chmod(kernel: Kernel, node: Node, mode: int) -> int:
    """chmod(2) on /proc/self/fd/N of a symlink opened with O_PATH: what lchmod(3) does without fchmodat2(2)."""
    fields = dict.fromkeys(fuse.SetattrIn._fields, 0) | {"valid": fuse.FATTR_MODE, "mode": stat.S_IFLNK | mode}
    return kernel.ask(fuse.FUSE_SETATTR, fuse.SetattrIn(**fields), node.id)


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_chmod_of_a_symlink_changes_neither_it_nor_what_it_leads_to(layers: Layers, where: str) -> None:
    """Until 6.6 (5d1f903f75a8) the kernel passed it on to the filesystem; and chmod(2) of the server's would follow."""
    victim = layers.place / "victim"
    victim.touch(0o600)
    layer = getattr(layers, where)
    for name, target in (("near", "file"), ("far", victim), ("dangling", "nowhere")):
        os.symlink(target, layer / name)
    (layer / "file").touch(0o600)
    with served(layers, minor=38) as (kernel, mount):
        for name in (b"near", b"far", b"dangling"):
            node, _ = mount.tree.lookup(mount.tree.root, name)
            assert chmod(kernel, node, 0o777) == errno.EOPNOTSUPP
        assert mount.events.crashes == 0
    assert [stat.S_IMODE(path.stat().st_mode) for path in (victim, layer / "file")] == [0o600, 0o600]
    assert where == "upper" or os.listdir(layers.upper) == []
