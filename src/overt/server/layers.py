"""The directories that a mount is made of: opened, and found fit or refused with words that say what to do.

Every refusal comes before anything is mounted, and leaves nothing behind.
"""

import contextlib
import errno
import fcntl
import math
import os
import shutil
import stat
import time
from collections.abc import Iterator
from typing import NamedTuple

from overt.host import mounts, process
from overt.host.files import RENAME_WHITEOUT, RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2, renameat2
from overt.overlay import marks
from overt.overlay.options import Options, unescape
from overt.tree.layer import UPPER, Layer, xattr_path
from overt.upper import probes

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_ATIME = {
    "relatime": mounts.MOUNT_ATTR_RELATIME,
    "noatime": mounts.MOUNT_ATTR_NOATIME,
    "strictatime": mounts.MOUNT_ATTR_STRICTATIME,
}


class Refusal(Exception):
    """A mount that cannot be; the text is for the user."""


class Layers(NamedTuple):
    """The opened layers, uppermost first; the upper's work directory, or -1; descriptors held while the mount lives."""

    layers: list[Layer]
    work: int
    held: list[int]
    data: list[Layer]
    """data-only ones"""

    def close(self) -> None:
        """Let go of everything."""
        for layer in (*self.layers, *self.data):
            layer.close()
        for fd in [*self.held, self.work]:
            if fd >= 0:
                os.close(fd)


def open_layers(options: Options) -> Layers:
    """Open what `options` names; raise `Refusal`."""
    if not process.is_capable("sys_admin"):
        raise Refusal("mounting is not permitted: it needs root (CAP_SYS_ADMIN), or a user namespace (unshare -Urm)")
    named = (*options.lower, *options.data)
    if len(set(named)) < len(named):
        twice = next(path for path in named if named.count(path) > 1)
        raise Refusal(f"the layer {twice} is named twice")
    below = {f"lowerdir {path}": path for path in options.lower}
    below |= {f"data layer {path}": path for path in options.data}
    paths = dict(below)
    if options.upper is not None and options.work is not None:
        paths |= {f"upperdir {options.upper}": options.upper, f"workdir {options.work}": options.work}
    for what, path in paths.items():
        _must_be_directory(what, path)
    real = {path: os.path.realpath(path) for path in paths.values()}
    _must_not_overlap(paths, real)
    prefix = marks.USER_PREFIX if options.user_xattr else marks.PREFIX
    result = Layers([], -1, [], [])
    try:
        if options.upper is not None and options.work is not None:
            result = _open_upper(options.upper, options.work, real, prefix, access_times(options))
            prepare_work(result.work, options.work)
        for index, (what, path) in enumerate(below.items(), UPPER + 1):
            kind = result.layers if index <= len(options.lower) else result.data
            try:
                kind.append(Layer(index, _clone_lower(path), prefix))
            except OSError as error:
                raise Refusal(f"{what}: {error.strerror}") from None
        return result
    except (Refusal, OSError):
        if result.work >= 0:
            remove_work(result.work)
        result.close()
        raise


def access_times(options: Options) -> int:
    """What reading does to access times, as MOUNT_ATTR_* bits; nothing on a read-only mount, whose upper is not one."""
    if options.read_only:
        return mounts.MOUNT_ATTR_NOATIME
    return _ATIME[options.atime] | (0 if options.dir_atime else mounts.MOUNT_ATTR_NODIRATIME)


def _clone_lower(path: str) -> int:
    try:
        return mounts.clone(path, attributes=Layer.LOWER)
    except PermissionError:  # in a user namespace how access times are kept cannot be changed
        return mounts.clone(path, attributes=Layer.LOWER & ~mounts.MOUNT_ATTR_NOATIME)


def _must_be_directory(what: str, path: str) -> None:
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise Refusal(f"{what}: not a directory")
    except OSError as error:
        raise Refusal(f"{what}: {error.strerror}") from None


def _must_not_overlap(paths: dict[str, str], real: dict[str, str]) -> None:
    """No layer may be, or be inside, another one: a change would then show up behind the overlay's back.

    `real`: the same without links. They are a way upwards, and not always to the same place: of /proc/PID/fd/N they say
    how it was called when it was opened.
    """
    roots: dict[tuple[int, int], str] = {}
    for what, path in paths.items():
        st = os.stat(path)
        other = roots.setdefault((st.st_dev, st.st_ino), what)
        if other != what:
            raise Refusal(f"{what} and {other} are the same directory")
    seen = set()
    for what, path in paths.items():
        above = real[path]
        while above != "/":
            above = os.path.dirname(above)
            if above in seen:
                break
            seen.add(above)
            try:
                st = os.stat(above)
            except OSError:  # it is not there any more
                continue
            around = roots.get((st.st_dev, st.st_ino))
            if around is not None:
                raise Refusal(f"{what} is inside {around}: the layers of an overlay must not overlap")


def _open_upper(upper: str, work: str, real: dict[str, str], prefix: bytes, times: int) -> Layers:
    """Upper and work directory through one clone of their mount: a rename between two mounts is refused (EXDEV).

    `real`: both paths without links. `times`: how the overlay's own mount treats access times, and not how the upper's
    does (ovl_get_upper).
    """
    common = os.path.commonpath([real[upper], real[work]])
    apart = Refusal(f"workdir {work} is not on the same mount as upperdir {upper}: put both on one filesystem")
    fds: list[int] = []
    try:
        clone = mounts.clone(common, attributes=mounts.MOUNT_ATTR_NODEV)
        fds.append(clone)
        with contextlib.suppress(PermissionError):  # in a user namespace that cannot be changed
            mounts.set_attributes(clone, times, mounts.MOUNT_ATTR__ATIME | mounts.MOUNT_ATTR_NODIRATIME)
        for path in (real[upper], real[work]):
            relative = os.path.relpath(path, common)
            fd = openat2(clone, relative, _DIRECTORY, resolve=RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
            fds.append(fd)
            if _identity(os.fstat(fd)) != _identity(os.stat(path)):
                raise apart
        for directory, what in ((fds[1], f"upperdir {upper}"), (fds[2], f"workdir {work}")):
            fds.append(_lock(directory, what))
    except FileNotFoundError:
        _close(fds)
        raise apart from None
    except OSError as error:
        _close(fds)
        raise Refusal(f"upperdir {upper}: {error.strerror}") from None
    except Refusal:
        _close(fds)
        raise
    # The clone's own descriptor stays open: closing it dissolves the mount, and no probe could be mounted there.
    return Layers([Layer(UPPER, fds[1], prefix)], fds[2], [clone, *fds[3:]], [])


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _identity(st: os.stat_result) -> tuple[int, int]:
    return st.st_dev, st.st_ino


def _lock(directory: int, what: str) -> int:
    """Claim a directory among overt's mounts; those of kernel overlayfs show in the mount table."""
    fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno != errno.EWOULDBLOCK:
            raise
        raise Refusal(f"{what} is in use by another overt mount: unmount that one first") from None
    if _in_kernel_overlay(directory):
        os.close(fd)
        raise Refusal(f"{what} is in use by a kernel overlay mount: unmount that one first")
    return fd


_seen: tuple[float, set[tuple[int, int]]] = (-math.inf, set())


def _in_kernel_overlay(directory: int) -> bool:
    """Whether an overlay in the mount table writes to it; not looked up again for a second, for whoever mounts a
    thousand.

    The table has the names that were given: one that is relative, or leads elsewhere by now, is not recognised.
    """
    global _seen
    identity = _identity(os.fstat(directory))
    if time.monotonic() - _seen[0] > 1 or identity in _seen[1]:
        _seen = time.monotonic(), set(_kernel_overlays())
    return identity in _seen[1]


def _kernel_overlays() -> Iterator[tuple[int, int]]:
    for options in mounts.superblock_options("overlay"):
        for option in options:
            key, _, value = option.partition(b"=")
            if key in (b"upperdir", b"workdir") and value.startswith(b"/"):
                with contextlib.suppress(OSError):
                    yield _identity(os.stat(unescape(os.fsdecode(value))))


# The work directory


def prepare_work(base: int, name: str) -> None:
    """Make `work` in the work directory, empty, as the kernel does; refuse one that a volatile mount left dirty."""
    try:
        try:
            os.mkdir(b"work", 0, dir_fd=base)
        except FileExistsError:
            _clear_work(base, name)
        bequeath_nothing(xattr_path(base, b"work"))
    except OSError as error:
        raise Refusal(f"workdir {name}: {error.strerror}") from None


def _clear_work(base: int, name: str) -> None:
    incompatible = _names(base, b"work/incompat")
    if "volatile" in incompatible:
        raise Refusal(
            f"workdir {name}: a volatile mount was here, and its upperdir may have lost data "
            "(work/incompat/volatile). Throw both away, or, if that data does not matter, "
            f"remove {name}/work/incompat"
        ) from None
    if incompatible:
        raise Refusal(f"workdir {name}: work/incompat/{incompatible[0]} forbids this mount") from None
    fd = os.open(b"work", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=base)
    try:
        for left in os.listdir(fd):
            remove_tree(fd, left)
    finally:
        os.close(fd)


def bequeath_nothing(work: bytes) -> None:
    """What is made in the work directory must not inherit its ACLs or its group (ovl_workdir_create)."""
    for acl in (b"system.posix_acl_default", b"system.posix_acl_access"):
        try:
            os.removexattr(work, acl)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
    os.chown(work, os.geteuid(), os.getegid())
    os.chmod(work, 0)


def remove_work(base: int) -> None:
    """Take away the `work` that was made for a mount that came to nothing; one that is not empty was there before.

    Raises nothing: why the mount came to nothing, a filesystem that is read-only perhaps, is what is to be said.
    """
    with contextlib.suppress(OSError):
        os.rmdir(b"work", dir_fd=base)


def remove_unclaimed_work(base: int) -> None:
    """The same when the mount has let go of the work directory, unless another has claimed it by now."""
    with contextlib.suppress(OSError, Refusal):
        claim = _lock(base, "workdir")
        remove_work(base)
        os.close(claim)


def remove_tree(directory: int, name: str) -> None:
    """Remove what a dead mount left in the work directory."""
    if stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
        shutil.rmtree(name, dir_fd=directory)
    else:
        os.unlink(name, dir_fd=directory)


def _names(base: int, path: bytes) -> list[str]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=base)
    except FileNotFoundError:
        return []
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def volatile_mark(inner: int) -> Iterator[None]:
    """Leave the mark that refuses the next mount: nobody knows what of this upper is on the disk.

    `inner` is the `work` in the work directory. The body is the last step of mounting, before which nobody can have
    written anything: if it raises, what was made of the mark goes again.
    """
    made = []
    try:
        for name in ("incompat", "incompat/volatile"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=inner)
                made.append(name)
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # one mark too many refuses a mount, and loses nothing
            for name in reversed(made):
                os.rmdir(name, dir_fd=inner)
        raise


def refuse_own(layers: list[Layer], options: Options, own: set[int]) -> None:
    """Raise `Refusal` if a layer is on a mount of this server (`own`: their st_dev), which would wait for itself."""
    shared = {layer.device for layer in layers} & own
    upper = [f"upperdir {options.upper}"] if options.upper is not None else []
    lower = (f"lowerdir {path}" for path in (*options.lower, *options.data))
    for layer, what in zip(layers, [*upper, *lower], strict=True):
        if layer.device in shared:
            raise Refusal(f"{what} is on a mount of this same server: mount it with a server of its own")


def refuse_unseen(inner: int, upper: str) -> None:
    """unseen=refuse: raise `Refusal` while the upper has an error that nobody has seen.

    That is what the kernel does with its volatile mounts, so it is asked by one; nothing is flushed or taken away.
    """
    try:
        os.close(probes.mount(inner, volatile=True))
    except OSError as error:
        if error.errno != errno.EIO:
            raise Refusal(
                f"upperdir {upper}: unseen=refuse needs an upper that kernel overlayfs accepts ({error})"
            ) from None
        raise Refusal(
            f"upperdir {upper}: its filesystem has an error that nobody has been told of (unseen=refuse): look after "
            "it, `sync -f` there reports it once, and mount again"
        ) from None


def prove(work: int, upper: str, prefix: bytes) -> None:
    """Try what an upper has to be able to do; raise `Refusal` naming what it cannot. `work` is empty and ours."""

    def attempt(what: str, *steps: object) -> None:
        try:
            for step in steps:
                step()  # type: ignore[operator]
        except OSError as error:
            raise Refusal(
                f"upperdir {upper}: this filesystem cannot serve as an upper: no {what} ({error.strerror})"
            ) from None

    def nameless() -> None:
        os.close(os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=work))

    attempt("nameless files (O_TMPFILE)", nameless)
    attempt("new files", lambda: os.mknod(b"#a", stat.S_IFREG | 0o600, dir_fd=work))
    try:
        kind = prefix.split(b".")[0].decode()
        attempt(f"{kind} xattrs", lambda: os.setxattr(xattr_path(work, b"#a"), prefix + b"proof", b""))
        attempt("RENAME_WHITEOUT", lambda: renameat2(work, b"#a", work, b"#b", RENAME_WHITEOUT))
    finally:
        for name in ("#a", "#b"):
            if os.path.lexists(f"/proc/self/fd/{work}/{name}"):
                os.unlink(name, dir_fd=work)
