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

    __slots__ = ("_layers", "_opened")

    def __init__(self, layers: Iterable[Layer]) -> None:
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

    def find(self, value: bytes, mode: int) -> os.stat_result | None:
        """The lower file that an origin names, for a copy of this st_mode; None if it names none that is there."""
        wanted = origin.decode(value)
        if wanted is None or wanted.uuid == _NONE:
            return None
        fds = [fd for fd, uuid in map(self._open, self._layers.values()) if uuid == wanted.uuid]
        if len(fds) != 1:
            return None
        try:
            fd = open_by_handle(fds[0], Handle(wanted.type, wanted.handle), os.O_PATH)
        except OSError:  # removed, or not for us to follow (a user namespace): then the copy has a number of its own
            return None
        try:
            st = os.fstat(fd)
        finally:
            os.close(fd)
        return st if stat.S_IFMT(st.st_mode) == stat.S_IFMT(mode) else None

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
