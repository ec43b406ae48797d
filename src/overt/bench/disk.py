"""The disk under all that is measured: ext4 on a loop device over a file in memory.

Memory, so that the machine's own disk is no factor and nothing is left on it. One disk, the lower layers on it too, as
in a container store: copy-up inside one filesystem and across two take different paths in the kernel.

The file is allocated before anything is measured and never shrinks: in a virtual machine the first touch of a page may
cost the host several microseconds, and whoever writes first would pay for all.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from overt.bench import tools
from overt.host import files, loop, mounts
from overt.server import registry


@contextlib.contextmanager
def disk(size: int) -> Iterator[Path]:
    """A directory in a mount namespace of one's own: `ext4`, a filesystem of `size` bytes, and `memory`, a tmpfs.

    The calling process must be in a private mount namespace already. Raises OSError.
    """
    with contextlib.ExitStack() as undo:
        place = Path(tempfile.mkdtemp(prefix="overt-bench-"))
        undo.callback(place.rmdir)
        _mount("tmpfs", place, [("source", "overt-bench"), ("size", str(size + (512 << 20)))], undo)
        for name in ("ext4", "memory"):
            (place / name).mkdir()
        image = place / "image"
        backing = os.open(image, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        undo.callback(os.close, backing)
        os.truncate(backing, size)
        # Nothing is left to the kernel to initialise in the background. An inode to 32 KiB: the tables are written out.
        tools.run("mkfs.ext4", "-q", "-F", "-i", "32768", "-J", "size=64",
                  "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", image)  # fmt: skip
        os.posix_fallocate(backing, 0, size)
        device = loop.attach(backing, name="overt-bench")
        try:
            _mount("ext4", place / "ext4", [("source", device.path)], undo)
        finally:
            os.close(device.fd)
        # /run is in memory on most systems; where it is not, that disk would be measured with each mount.
        _mount("tmpfs", registry.directory(), [("source", "overt-bench"), ("mode", "700")], undo)
        yield place


def _mount(kind: str, target: Path, options: list[tuple[str, str | int | None]], undo: contextlib.ExitStack) -> None:
    mount = mounts.new_mount(kind, options)
    try:
        mounts.attach(mount, str(target))
    finally:
        os.close(mount)
    undo.callback(mounts.umount, str(target), mounts.MNT_DETACH)


def settle(directory: Path) -> None:
    """Write back what the filesystem of `directory` holds: no sample pays for the one before it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        files.syncfs(fd)
    finally:
        os.close(fd)
