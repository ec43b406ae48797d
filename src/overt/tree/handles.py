"""File handles of lower files: made at copy-up, and followed to show a copy with its lower file's inode number.

A handle means something on one filesystem, which is known by its UUID. Where that is missing, or two of the layers'
filesystems have the same, no handle is followed: it could be another disk's (ovl_lower_uuid_ok).
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterable

from overt.host.files import FS_IOC_GETFSUUID, Handle, name_to_handle, open_by_handle
from overt.overlay import origin
from overt.overlay.origin import Origin
from overt.tree.layer import UPPER, Layer

_NONE = bytes(16)
_NO_HANDLES = (errno.EOPNOTSUPP, errno.EOVERFLOW, errno.EPERM, errno.ENOSYS)


class Handles:
    """The lower layers' filesystems; each is opened when it is first needed."""

    __slots__ = ("_layers", "_nameless", "_opened")

    def __init__(self, layers: Iterable[Layer], *, nameless: bool = False) -> None:
        """`nameless`: follow handles on a filesystem without a UUID too, if it is the only one."""
        self._nameless = nameless
        self._layers = {layer.device: layer for layer in reversed(list(layers)) if layer.index != UPPER}
        self._opened: dict[int, tuple[int, bytes]] = {}
        """st_dev -> descriptor for open_by_handle_at, UUID"""

    def close(self) -> None:
        """Let go of the descriptors."""
        for fd, _ in self._opened.values():
            os.close(fd)
        self._opened.clear()

    def of(self, layer: Layer, directory: int, name: bytes) -> bytes:
        """What is written down of the origin of a copy of `name` in `directory` of a lower layer."""
        try:
            handle = name_to_handle(directory, name)
        except OSError as error:
            if error.errno not in _NO_HANDLES:
                raise
            return origin.UNKNOWN
        return origin.encode(Origin(self._open(layer)[1], handle.type, handle.bytes))

    def problem(self, upper: Layer) -> str:
        """Why not every lower file can be named by a handle that leads to it; empty if it can (ovl_lower_dir)."""
        uuids = []
        try:
            name_to_handle(upper.root)
            for layer in self._layers.values():
                fd, uuid = self._open(layer)
                os.close(open_by_handle(fd, name_to_handle(layer.root), os.O_PATH))
                if uuid in uuids:
                    return "two filesystems of lower layers have the same UUID, or none"
                uuids.append(uuid)
        except OSError as error:
            if error.errno not in (*_NO_HANDLES, errno.ESTALE):
                raise
            return "the filesystem of a layer has no file handles, or they cannot be followed here"
        return ""

    def find(self, value: bytes, mode: int) -> os.stat_result | None:
        """The lower file that an origin names, for a copy of this st_mode; None if it names none that is there."""
        try:
            st = self.lower(value)
        except OSError:  # not for us to follow (a user namespace): then the copy has a number of its own
            return None
        return st if st is not None and stat.S_IFMT(st.st_mode) == stat.S_IFMT(mode) else None

    def can_follow(self, value: bytes) -> bool:
        """Whether a handle is one, and of a filesystem that is here, so that its file is there or gone for good."""
        return self._wanted(value) is not None

    def _wanted(self, value: bytes) -> tuple[int, Handle] | None:
        wanted = origin.decode(value)
        if wanted is None or (wanted.uuid == _NONE and not self._nameless):
            return None
        fds = [fd for fd, uuid in map(self._open, self._layers.values()) if uuid == wanted.uuid]
        return (fds[0], Handle(wanted.type, wanted.handle)) if len(fds) == 1 else None

    def lower(self, value: bytes) -> os.stat_result | None:
        """The lower file that a handle names; None if there is none."""
        wanted = self._wanted(value)
        if wanted is None:
            return None
        try:
            fd = open_by_handle(*wanted, os.O_PATH)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            return None
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def _open(self, layer: Layer) -> tuple[int, bytes]:
        opened = self._opened.get(layer.device)
        if opened is None:
            fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=layer.root)
            opened = self._opened[layer.device] = fd, _uuid(fd)
        return opened


def _uuid(fd: int) -> bytes:
    """A filesystem's UUID (FS_IOC_GETFSUUID since Linux 6.9); zeros where it has none that can be had."""
    answer = bytearray(17)
    try:
        fcntl.ioctl(fd, FS_IOC_GETFSUUID, answer)
    except OSError:
        return _NONE
    return bytes(answer[1:]) if answer[0] == len(_NONE) else _NONE


def handle_in_upper(upper: Layer) -> bytes:
    """What names the root of an upper."""
    fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=upper.root)
    try:
        handle = name_to_handle(fd)
        return origin.encode(Origin(_uuid(fd), handle.type, handle.bytes), upper=True)
    finally:
        os.close(fd)
