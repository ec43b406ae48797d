"""A mount that shows other owners, links or xattrs than its layers have (overlay/view.py).

What comes in is translated to what the layers have before any handler sees it, what goes out on its way: the handlers
know the layers only. The caller's own ids are translated too: files are made as that user, and a container's root is 0.
"""

import errno
import os
import stat
from typing import Any

from overt.fuse.attr import with_owner
from overt.fuse.request import Request
from overt.overlay import view
from overt.overlay.view import IdMap
from overt.server import identity
from overt.server.mount import Mount
from overt.tree.node import Node
from overt.tree.owners import OwnersTree
from overt.wire import fuse

_UID, _GID = 11, 12
"""where SetattrIn has them"""
_XATTR = {fuse.FUSE_GETXATTR, fuse.FUSE_SETXATTR, fuse.FUSE_LISTXATTR, fuse.FUSE_REMOVEXATTR}
_CHANGES_XATTR = {fuse.FUSE_SETXATTR, fuse.FUSE_REMOVEXATTR}


class ViewedMount(Mount):
    """Mounts with nothing of this do not pay for it: they are plain `Mount`s."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        asked = self.options.view
        self._view = asked
        self._uids = IdMap(asked.uids, asked.squash_uid)
        self._gids = IdMap(asked.gids, asked.squash_gid)

    def take(self, request: Request) -> None:
        """Serve one request as it came from the kernel."""
        refused = self._refused(request)
        if refused:
            self.send(self.session.error(request.unique, refused))
            return
        if self._view.maps:
            self._store(request)
        self.dispatch(request)

    def _refused(self, request: Request) -> int:
        """The errno for what this mount does not have, or 0."""
        if not self._view.xattrs and request.opcode in _XATTR:
            return errno.ENOSYS  # the kernel remembers, and asks no more
        if request.opcode in _CHANGES_XATTR and request.name in self.unlisted:
            return errno.EOPNOTSUPP
        return 0

    def _store(self, request: Request) -> None:
        """Translate a request to what the layers have."""
        opcode = request.opcode
        uid, gid = self._uids.stored, self._gids.stored
        request.uid, request.gid = uid(request.uid), gid(request.gid)
        if opcode == fuse.FUSE_SETATTR:
            arg = list(request.arg)
            if arg[0] & fuse.FATTR_UID:
                arg[_UID] = uid(arg[_UID])
            if arg[0] & fuse.FATTR_GID:
                arg[_GID] = gid(arg[_GID])
            request.arg = tuple(arg)
        elif opcode == fuse.FUSE_SETXATTR:
            if request.name in view.ACLS:
                request.payload = view.acl(bytes(request.payload), uid, gid)
            elif request.name == view.CAPABILITY:
                request.payload = view.stored_capability(bytes(request.payload), uid)

    def attr(self, node: Node, st: os.stat_result) -> bytes:
        """A node's packed attributes, as they are shown."""
        one = 1 if self._view.static_nlink and stat.S_ISDIR(st.st_mode) else None
        return with_owner(super().attr(node, st), one, self._uids.shown(st.st_uid), self._gids.shown(st.st_gid))

    def become(self, request: Request, umask: int) -> None:
        """Make files as the caller from here on, or as the server, which writes down whose they are."""
        if isinstance(self.tree, OwnersTree):
            self.tree.creator = request.uid, request.gid
            identity.become(0, 0, umask)
        else:
            super().become(request, umask)

    def statx(self, node: Node, st: fuse.Statx) -> fuse.Statx:
        """What statx(2) is to show of a file that is `st`."""
        if self._view.permissions:
            own = self.tree.stat(node)
            st = st._replace(uid=own.st_uid, gid=own.st_gid, mode=own.st_mode)
        st = st._replace(uid=self._uids.shown(st.uid), gid=self._gids.shown(st.gid))
        return st._replace(nlink=1) if self._view.static_nlink and stat.S_ISDIR(st.mode) else st

    def xattr(self, name: bytes, value: bytes) -> bytes:
        """What an xattr is to show."""
        if not self._view.maps:
            return value
        if name in view.ACLS:
            return view.acl(value, self._uids.shown, self._gids.shown)
        return view.shown_capability(value, self._uids.shown) if name == view.CAPABILITY else value
