"""From an overlay in some container's mount table to directories of its upper that we can use.

The paths in the table mean something to whoever mounted the overlay: the engine, on the host; or, when an overlay was
mounted in a container, a process there. Both are tried. A path alone proves nothing, so what is found is compared: an
overlay carries its UUID (FS_IOC_GETFSUUID), and its upper directory the same one in an xattr (Linux 6.6). An overlay
without a UUID, or of which nobody could be asked for it, is believed where it is mounted on the host as well, for then
it was the host that named the path. Else a container could name any directory of the host's. Of the workdir's path
nothing can be compared, so it is not used.

What was found and proven is opened again through a mount of our own namespace, by its handle: the kernel mounts no
probe on another namespace's (fs/namespace.c, clone_private_mount), and nobody but the host mounts anything there.
Where our namespace has no mount of that filesystem, the container's has to do, without probes.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from overt.guard import table
from overt.guard.table import Mounted
from overt.host import files, private

_UUID_XATTRS = ("trusted.overlay.uuid", "user.overlay.uuid")
_PREFIX = ".overt-guard-"
_BESIDE = files.RESOLVE_NO_XDEV | files.RESOLVE_NO_SYMLINKS
"""an upper is never the root of a mount, for the workdir is on the same one: its parent is on it, too"""


class Place(NamedTuple):
    """Directories on an upper, open."""

    beside: int
    """the one that the upper directory is in"""
    scratch: int
    """our own in that one, for probes; not in the workdir, which the kernel takes for its overlay's alone"""
    name: str
    """what it is called there"""
    upper: int
    """the upper directory"""

    def close(self) -> OSError | None:
        """Remove the scratch directory, if the engine has not done so, and close.

        Returns why it could not be removed (the disk may be dead, or read-only by now), or None.
        """
        why = None
        try:
            os.rmdir(self.name, dir_fd=self.beside)
        except FileNotFoundError:
            pass
        except OSError as error:
            why = error
        for fd in (self.scratch, self.beside, self.upper):
            os.close(fd)
        return why


def find(mounted: Mounted, pids: Iterable[int], uuid: bytes = b"") -> Place:
    """Directories on the upper of an overlay; `pids` are processes that see it, `uuid` is its UUID if that is known.

    Raises OSError: FileNotFoundError where the upper cannot be found, and what making the scratch directory raises.
    """
    roots = ["/", *(f"/proc/{pid}/root" for pid in pids)]
    uuid = uuid or _first(_mounted_uuid(root, mounted) for root in roots[1:])
    if not uuid:
        roots = ["/"] if _is_the_hosts(mounted) else []
    why: OSError | None = None
    for root in roots:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            upper = _open(root, mounted.upperdir)
            stack.callback(os.close, upper)
            if uuid and _upper_uuid(upper) != uuid:
                continue
            beside = files.openat2(upper, "..", private.DIRECTORY, resolve=_BESIDE)
            stack.callback(os.close, beside)
            for number in _ours(root, upper) if root != "/" else ():
                with contextlib.suppress(OSError):  # the handle is not known there, or nothing can be written
                    beside, upper = _through(number, [beside, upper], stack)
                    break
            try:
                place = _make(beside, upper)
            except OSError as error:
                why = error
                continue
            return place
    name = os.fsdecode(mounted.upperdir)
    raise why or FileNotFoundError(errno.ENOENT, "the upper of an overlay is not to be found", name)


def _ours(root: str, fd: int) -> Iterator[tuple[int, bytes]]:
    """The mounts in our namespace of the filesystem that `fd` is on in that of the process with this root."""
    theirs = table.read(int(root.split("/")[2])).get(_mount_number(fd))
    for number, each in table.read(os.getpid()).items():
        if theirs is not None and each.device == theirs.device:
            yield number, each.point


def _through(mount: tuple[int, bytes], fds: list[int], stack: contextlib.ExitStack) -> list[int]:
    """The same directories, opened through a mount of our namespace: its number and place. `stack` closes them.

    Raises OSError: ESTALE where they are others, EROFS where it is read-only, and what open_by_handle_at(2) raises.
    """
    at = os.open(mount[1], os.O_PATH | os.O_DIRECTORY)
    stack.callback(os.close, at)
    if _mount_number(at) != mount[0]:  # something is mounted over it, and may be anybody's server
        raise OSError(errno.ESTALE, "another mount", os.fsdecode(mount[1]))
    at = os.open(".", private.DIRECTORY, dir_fd=at)
    stack.callback(os.close, at)
    if os.fstatvfs(at).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, "a read-only mount", os.fsdecode(mount[1]))
    found = []
    for fd in fds:
        found.append(files.open_by_handle(at, files.name_to_handle(fd), private.DIRECTORY))
        stack.callback(os.close, found[-1])
        if not os.path.sameopenfile(fd, found[-1]):
            raise OSError(errno.ESTALE, "another directory", os.fsdecode(mount[1]))
    return found


def _mount_number(fd: int) -> int:
    return files.whereabouts(b"/proc/self/fd/%d" % fd, files.STATX_MNT_ID).mount


def _make(beside: int, upper: int) -> Place:
    """With duplicates of these descriptors. Raises OSError as `private.make` does."""
    name = _PREFIX + os.urandom(8).hex()
    with contextlib.ExitStack() as stack:
        try:
            scratch = private.make(beside, name)
        except OSError:
            with contextlib.suppress(OSError):  # it was not made, or has been replaced by something that is in use
                os.rmdir(name, dir_fd=beside)
            raise
        stack.callback(os.close, scratch)
        ours = os.dup(beside)
        stack.callback(os.close, ours)
        place = Place(ours, scratch, name, os.dup(upper))
        stack.pop_all()
        return place


def _open(root: str, path: bytes) -> int:
    """A directory as a process sees it whose root is `root`; magic links are not followed, they lead out of it."""
    base = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        resolve = files.RESOLVE_IN_ROOT | files.RESOLVE_NO_MAGICLINKS
        return files.openat2(base, path, private.DIRECTORY, resolve=resolve)
    finally:
        os.close(base)


def uuid_of(fd: int) -> bytes:
    """The UUID of the overlay that our own descriptor `fd` is of; empty if it has none."""
    answer = bytearray(17)
    try:
        fcntl.ioctl(fd, files.FS_IOC_GETFSUUID, answer)
    except OSError:  # ENOTTY
        return b""
    return bytes(answer[1 : 1 + answer[0]])


def _is_the_hosts(mounted: Mounted) -> bool:
    """Whether the overlay is mounted where the paths in its options mean to us what they do to whoever mounted it."""
    for pid in (1, os.getpid()):
        with contextlib.suppress(OSError):  # none with this number is to be seen
            for each in table.read(pid).values():
                if each._replace(point=mounted.point, id=mounted.id) == mounted:
                    return True
    return False


def _mounted_uuid(root: str, mounted: Mounted) -> bytes:
    try:
        fd = _open(root, mounted.point)
    except OSError:
        return b""
    try:
        if os.fstat(fd).st_dev != mounted.device:  # something is mounted over it
            return b""
        return uuid_of(fd)
    except OSError:  # what is there is not for us to look at
        return b""
    finally:
        os.close(fd)


def _upper_uuid(directory_fd: int) -> bytes:
    for name in _UUID_XATTRS:
        with contextlib.suppress(OSError):
            return os.getxattr(directory_fd, name)
    return b""


def _first(found: Iterable[bytes]) -> bytes:
    return next((value for value in found if value), b"")
