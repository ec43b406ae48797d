"""A tree whose files have their owners and modes in an xattr: see `overt.overlay.owners`.

Each stat costs one xattr more, so trees without them are plain ones.
"""

import errno
import os
import stat
from collections.abc import Callable

from overt.overlay import owners
from overt.overlay.owners import Owner
from overt.tree.images import ImageTree
from overt.tree.layer import UPPER, Layer, xattr_path
from overt.tree.node import Node
from overt.tree.tree import Tree


class OwnersTree(Tree):
    """The merged tree with owners as the xattrs have them."""

    kinds: dict[int, bytes | None]
    """the xattr of each layer, or None for one whose files are as they seem to be"""
    creator = 0, 0
    """who makes the next file"""

    def find(self, parent: Node, name: bytes) -> tuple[Node, os.stat_result] | None:
        """The node that `name` is in directory `parent`, and its attributes; None without one."""
        found = super().find(parent, name)
        return None if found is None else (found[0], self.stat(found[0]))

    def stat(self, node: Node) -> os.stat_result:
        """What is to be shown of the file."""
        return self.shown(node, super().stat(node))

    def shown(self, node: Node, st: os.stat_result) -> os.stat_result:
        """The same of one whose own attributes are `st`."""
        owner = self._owner(node, st)
        mode = stat.S_IFMT(st.st_mode) | owner.mode
        rest = {key: getattr(st, key) for key in _REST}
        return os.stat_result((mode, *st[1:4], owner.uid, owner.gid, *st[6:10]), rest)

    def _owner(self, node: Node, st: os.stat_result) -> Owner:
        kind = self.kinds.get(node.layer)
        if kind is not None and owners.can_carry(st.st_mode):
            try:
                return owners.decode(os.getxattr(self.path(node), kind, follow_symlinks=node.anchor >= 0))
            except ValueError:
                raise OSError(errno.EIO, f"{os.fsdecode(kind)} says nothing") from None
            except OSError as error:
                if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                    raise
        return Owner(st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode))

    # Changing

    finishes = True

    def finish(self, parent: Node, path: bytes, *, follow: bool = False) -> None:
        """A file was made by the server for `creator`: write that down. Its group may be its directory's."""
        uid, gid = self.creator
        st = os.stat(path, follow_symlinks=follow)
        mode = stat.S_IMODE(st.st_mode)
        above = self.stat(parent)
        if above.st_mode & stat.S_ISGID:
            gid = above.st_gid
            mode |= stat.S_ISGID if stat.S_ISDIR(st.st_mode) else 0
        if not owners.can_carry(st.st_mode):
            os.chown(path, uid, gid, follow_symlinks=follow)
            if not stat.S_ISLNK(st.st_mode):
                os.chmod(path, mode)
            return
        self._note(path, Owner(uid, gid, mode), follow=follow)
        os.chmod(path, owners.backing(mode))

    def chmod(self, node: Node, mode: int) -> None:
        """chmod(2)."""
        st = super().stat(node)
        self._write(node, st, self._owner(node, st)._replace(mode=mode))

    def chown(self, node: Node, uid: int, gid: int) -> None:
        """lchown(2), which takes setuid bits of files away."""
        st = super().stat(node)
        owner = self._owner(node, st)
        mode = owner.mode
        if stat.S_ISREG(st.st_mode):
            mode &= ~(stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0))
        self._write(node, st, Owner(owner.uid if uid < 0 else uid, owner.gid if gid < 0 else gid, mode))

    def _write(self, node: Node, st: os.stat_result, owner: Owner) -> None:
        if not owners.can_carry(st.st_mode):
            super().chown(node, owner.uid, owner.gid)
            if not stat.S_ISLNK(st.st_mode):
                super().chmod(node, owner.mode)
            return
        self._note(self.path(node), owner, follow=node.anchor >= 0)
        super().chmod(node, owners.backing(owner.mode))

    def _note(self, path: bytes, owner: Owner, *, follow: bool) -> None:
        kind = self.kinds[UPPER]
        assert kind is not None
        os.setxattr(path, kind, owners.encode(owner), follow_symlinks=follow)

    # Copying up

    def notes(self, node: Node, st: os.stat_result) -> dict[bytes, bytes]:
        """What a copy of a file is to have for its owner and mode."""
        kind = self.kinds[UPPER]
        return {} if kind is None or not owners.can_carry(st.st_mode) else {kind: owners.encode(self._owner(node, st))}

    def own(self, st: os.stat_result) -> Owner:
        """What the copy itself is to have."""
        if not owners.can_carry(st.st_mode):
            return super().own(st)
        return Owner(os.geteuid(), os.getegid(), owners.backing(st.st_mode))

    def carried(self, layer: int) -> Callable[[bytes], bytes | None]:
        """How a copy of a layer's file calls its xattrs; None for one that stays behind."""
        kind, upper = self.kinds[layer], self.kinds[UPPER]
        plain = super().carried(layer)

        def name(xattr: bytes) -> bytes | None:
            users = owners.shown(kind, xattr)
            return None if users is None or plain(users) is None else owners.stored(upper, users)

        return name

    # xattrs

    def stored_xattr(self, node: Node, name: bytes) -> bytes:
        """The name that a file's layer has for what users call `name`; EPERM for what is not theirs."""
        try:
            return owners.stored(self.kinds[node.layer], super().stored_xattr(node, name))
        except ValueError:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM)) from None

    def shown_xattr(self, node: Node, name: bytes) -> bytes | None:
        """What users call an xattr of a file's layer; None for what is not theirs."""
        users = owners.shown(self.kinds[node.layer], name)
        return None if users is None else super().shown_xattr(node, users)


class OwnersImageTree(OwnersTree, ImageTree):
    """The same where files may be whiteouts."""


_REST = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_blksize", "st_blocks", "st_rdev")


def kinds_of(layers: list[Layer], permissions: int) -> dict[int, bytes | None]:
    """Which xattr each layer has, as its root says; an upper without one gets it (xattr_permissions=1 or 2).

    What it says of the root is what the topmost lower layer with one has, or how the upper's root is.
    """
    found: dict[int, bytes | None] = {}
    values = {}
    for layer in layers:
        found[layer.index] = None
        for kind in owners.KINDS:
            try:
                value = os.getxattr(xattr_path(layer.root, b"."), kind)
                values[layer.index] = owners.encode(owners.decode(value))
            except ValueError:
                raise OSError(errno.EINVAL, f"a layer's root has an {os.fsdecode(kind)} that says nothing") from None
            except OSError as error:
                if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                    raise
                continue
            found[layer.index] = kind
            break
    if UPPER not in found:
        return found
    asked = owners.PRIVILEGED if permissions == 1 else owners.CONTAINERS
    if found[UPPER] is not None and (found[UPPER] == owners.PRIVILEGED) == (asked == owners.PRIVILEGED):
        return found
    st = os.fstat(layers[0].root)
    own = owners.encode(Owner(st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)))
    os.setxattr(xattr_path(layers[0].root, b"."), asked, next(iter(values.values()), own))
    found[UPPER] = asked
    return found
