"""Copy-up: a file of a lower layer gets an upper copy before it is changed (fs/overlayfs/copy_up.c).

All or nothing: the copy is made out of sight in the work directory, whole and with all its attributes, flushed where
fsync=auto or strict says so, and given its name in one step. Whatever fails before that step leaves the lower file as
it was and nothing in the upper; the kernel clears the work directory at the next mount, and so do we.
"""

import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Iterator

from overt.host.files import FICLONE, start_flush, utimensat
from overt.overlay import marks
from overt.overlay.index import beside_upper
from overt.tree.copies import make_impure, times_of
from overt.tree.data import Data
from overt.tree.flags import carry_flags, carry_flags_of_directory
from overt.tree.layer import UPPER, xattr_path
from overt.tree.node import Node
from overt.tree.places import place_of
from overt.tree.tree import Later, Tree

Name = tuple[Node, bytes]
"""a directory of the merged tree, and a name in it"""
Carried = Callable[[bytes], bytes | None]
Opened = list[tuple[int, int]]
"""descriptors, and those that are to take their place"""

_ATTRIBUTES = -1
"""in place of how much data is to be copied: none, it stays where it is"""
_DATA = -2
"""in place of the same, of a file whose attributes are copied: one who fetches its data does so for all"""
_CAPABILITY = b"security.capability"
_CHUNK = 4 << 20
"""how many bytes to copy before the disk is given them, so that the flush at the end does not find all of them"""
_PIECE = 1 << 20
"""the same, where they pass through this process"""
_CANNOT = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ETXTBSY, errno.EBADF)


def copy_up(
    tree: Tree, node: Node, limit: int | None = None, *, data: bool = False, called: Name | None = None
) -> None:
    """Make sure that `node` and all directories above it are in the upper.

    `data`: its data too, which otherwise stays where it is with metacopy=on; `limit`: at most so many bytes of it, the
    rest is about to be cut off; `called`: by which name the request knows it, if it says so. Raises OSError (EROFS
    without an upper), or `Later` where data has to be copied or flushed.
    """
    if node.layer == UPPER:
        if data and node.data is not None:
            _fetch(tree, node)
        return
    if not tree.writable:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    missing = []
    above = called[0] if called is not None else node.parent
    while above is not None and above.layer != UPPER:
        missing.append(above)
        above = above.parent
    while missing:
        _copy_up_one(tree, missing.pop(), None)
    _copy_up_one(tree, node, limit if data or not tree.metacopy else _ATTRIBUTES, called)


def _copy_up_one(tree: Tree, node: Node, limit: int | None, called: Name | None = None) -> None:
    if node.anchor >= 0:
        _nameless(tree, node, limit)
        return
    assert node.parent is not None
    source, name = tree.at(node)
    st = os.stat(name, dir_fd=source, follow_symlinks=False)
    parent = node.parent
    entry = b""
    if tree.index is not None and node.index is not None:
        entry = tree.index.entry(tree, node.layer, source, name)
        place = tree.index.fd, entry
    else:
        place = tree.dir_fd(parent, UPPER), name
        times = times_of(place[0])
        tree.changed.append(parent.id)  # of its time of change, which cannot be put back
        if _keeps_number(node, st):
            make_impure(tree, parent)
    opened: Opened = []
    if stat.S_ISREG(st.st_mode):
        copy = _data(tree, node, st, limit)
        try:
            done = os.fstat(copy)
            opened = _open_again(node, copy) if limit != _ATTRIBUTES else []
            try:
                os.link(b"/proc/self/fd/%d" % copy, place[1], dst_dir_fd=place[0], follow_symlinks=True)
            except OSError:
                _close(opened)
                raise
        finally:
            os.close(copy)
        if limit != _ATTRIBUTES:
            node.data = None
        elif node.data is None:
            node.data = Data(node.layer, (*place_of(parent, node.layer), name))
    else:
        done = _special(tree, node, st, source, place)
    # The copy has its name: nothing may fail from here on. The kernel does not look at what this comes to either.
    if not entry:
        with contextlib.suppress(OSError):
            utimensat(place[0], b".", *times)
    _settle(tree, node, st, done, opened)
    if tree.index is not None and entry:  # and every name shows it from here on, whether the upper gets one or not
        tree.index.copied_up(node, entry)
        tree.index.link_up(tree, node, *(called or (parent, name)))


def _keeps_number(node: Node, st: os.stat_result) -> bool:
    """Whether a copy is the same file to everybody: not one of the other names that a lower file has."""
    return stat.S_ISDIR(st.st_mode) or st.st_nlink == 1 or node.index is not None


def _notes(tree: Tree, node: Node, st: os.stat_result, directory: int, name: bytes) -> dict[bytes, bytes]:
    """xattrs that say where a copy comes from, and whatever else its file has not got itself."""
    mode = st.st_mode
    by_owner = tree.prefix == marks.USER_PREFIX
    found = tree.notes(node, st)
    if not _keeps_number(node, st) or (by_owner and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))):
        return found
    found[tree.prefix + marks.ORIGIN] = tree.handles.of(tree.layers[node.layer], directory, name)
    if node.index is not None:
        found[tree.prefix + marks.NLINK] = beside_upper(node.index.lower - 1)
    return found


def _open_again(node: Node, copy: int) -> Opened:
    """What the open files of `node` are to become: an open file of the copy for each, whose cursor begins here."""
    opened: Opened = []
    try:
        for handle in node.handles or ():
            flags = handle.flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOFOLLOW) | os.O_CLOEXEC
            opened.append((handle.fd, os.open(b"/proc/self/fd/%d" % copy, flags)))
    except OSError:
        _close(opened)
        raise
    return opened


def _close(opened: Opened) -> None:
    for _, replacement in opened:
        os.close(replacement)


def _settle(tree: Tree, node: Node, lower: os.stat_result, done: os.stat_result, opened: Opened) -> None:
    tree.in_upper(node, done, broken=not _keeps_number(node, lower))
    tree.changed.append(node.id)
    _take_over(opened)


def _take_over(opened: Opened) -> None:
    for fd, replacement in opened:
        os.dup2(replacement, fd, inheritable=False)
    _close(opened)


def _nameless(tree: Tree, node: Node, limit: int | None) -> None:
    """A lower file that was removed while in use: its copy gets no name either (ovl_copy_up_one on a deleted file)."""
    st = os.fstat(node.anchor)
    if not stat.S_ISREG(st.st_mode):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    copy = _data(tree, node, st, None if limit == _ATTRIBUTES else limit)
    try:
        done = os.fstat(copy)
        opened = _open_again(node, copy)
        try:
            anchor = os.open(b"/proc/self/fd/%d" % copy, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            _close(opened)
            raise
    finally:
        os.close(copy)
    os.close(node.anchor)
    node.anchor = anchor
    node.dropped = False
    node.data = None
    _settle(tree, node, st, done, opened)


# Data


def _data(tree: Tree, node: Node, st: os.stat_result, limit: int | None) -> int:
    """A nameless copy of a regular file in the work directory, with data and attributes; `Later` unless it is short.

    `limit` may be _ATTRIBUTES.
    """
    prepared = tree.prepared.pop((node, limit), None)
    if isinstance(prepared, int):
        return prepared
    length = st.st_size if limit is None else 0 if limit == _ATTRIBUTES else min(st.st_size, limit)
    flush = tree.sync == "strict" or (tree.sync == "auto" and length > 0)
    own = tree.open_own(node, os.O_RDONLY)
    source = -1
    try:
        notes = _notes(tree, node, st, own, b"")
        if length and node.data is not None:
            source = tree.open(node, os.O_RDONLY)
    except OSError:
        _done_with(own)
        raise

    carried = tree.carried(node.layer)

    def work() -> int:
        try:
            return _copy(tree, own, source, st, length, carried, notes, flush=flush, metacopy=limit == _ATTRIBUTES)
        finally:
            abandon()

    def abandon() -> None:
        _done_with(own)
        if source >= 0:
            _done_with(source)

    if not flush and length <= tree.inline_copy:
        return work()

    def finish(copy: object) -> None:
        tree.prepared[node, limit] = copy

    raise Later((node, limit), work, finish, abandon)


def _copy(
    tree: Tree, own: int, source: int, st: os.stat_result, length: int, carried: Carried, notes: dict[bytes, bytes], *,
    flush: bool, metacopy: bool,
) -> int:  # fmt: skip
    """A nameless copy, in the work directory, of all attributes of `own` and `length` bytes of it, or of `source`.

    `metacopy`: mark it as one that has no data, and is as long as if it had.
    """
    copy = os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=tree.work)
    try:
        _copy_data(source if source >= 0 else own, copy, length, flush=flush)
        if metacopy:
            os.truncate(copy, st.st_size)  # before it has capabilities, which that takes away
        owner = tree.own(st)
        os.fchown(copy, owner.uid, owner.gid)
        _copy_xattrs(own, copy, carried)
        carry_flags(own, copy, tree.prefix)
        for xattr, value in notes.items():
            os.setxattr(copy, xattr, value)
        if metacopy:
            os.setxattr(copy, tree.prefix + marks.METACOPY, b"")
        os.fchmod(copy, owner.mode)
        os.utime(copy, ns=(st.st_atime_ns, st.st_mtime_ns))
        if flush:
            os.fsync(copy)
    except BaseException:
        os.close(copy)
        raise
    return copy


class Filling:
    """What a file is to have when its data has come, for writing that changes times and takes capabilities away.

    It may be changed while a worker brings the data, which can take for ever: `lock` keeps the two apart, and is not
    held while data is waited for.
    """

    __slots__ = ("capability", "done", "lock", "times")

    def __init__(self, st: os.stat_result, capability: bytes | None) -> None:
        self.times = [st.st_atime_ns, st.st_mtime_ns]
        self.capability = capability
        self.lock = threading.Lock()
        self.done = False

    def put_back(self, fd: int) -> None:
        """The data has come, or will not: from here on the file is like any other."""
        with self.lock:
            self.done = True
            if self.capability is not None:
                os.setxattr(fd, _CAPABILITY, self.capability)
            os.utime(fd, ns=(self.times[0], self.times[1]))


@contextlib.contextmanager
def changing(node: Node) -> Iterator[Filling | None]:
    """Attributes of a file change; the body notes in what it gets, if anything, what is to stay so."""
    filling: Filling | None = node.filling
    if filling is None:
        yield None
        return
    with filling.lock:
        yield filling


def _fetch(tree: Tree, node: Node) -> None:
    """Give a file of the upper the data that it was copied up without (ovl_copy_up_meta_inode_data).

    The data comes into the file itself, which nobody reads while it has its mark; the mark goes last, so that a crash
    or an error before that leaves the data where it was. All of it comes, also for one who is about to cut it off: two
    who wait may want different parts, and he who cuts may fail.
    """
    key = node, _DATA
    target = tree.prepared.pop(key, None)
    if not isinstance(target, int):
        st = tree.stat(node)
        source = tree.open(node, os.O_RDONLY)
        try:
            target = tree.open_own(node, os.O_RDWR)
        except OSError:
            _done_with(source)
            raise
        flush = tree.sync != "volatile" and st.st_size > 0
        if node.filling is None or node.filling.done:  # otherwise somebody else's work is under way, with this one
            node.filling = Filling(st, _capability(target))
        filling = node.filling

        def work() -> int:
            return _fill(source, target, st.st_size, filling, flush=flush)

        def finish(filled: object) -> None:
            tree.prepared[key] = filled

        def abandon() -> None:
            _done_with(source)
            os.close(target)

        if flush or st.st_size > tree.inline_copy:
            raise Later(key, work, finish, abandon)
        work()
    try:
        opened = _open_again(node, target)
        try:
            os.removexattr(target, tree.prefix + marks.METACOPY)
        except OSError:
            _close(opened)
            raise
    finally:
        os.close(target)
    node.data = node.filling = None
    node.xattrs = None  # whoever asked while a capability was taken away was told so
    tree.changed.append(node.id)
    _take_over(opened)


def _capability(fd: int) -> bytes | None:
    try:
        return os.getxattr(fd, _CAPABILITY)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        return None


def _fill(source: int, target: int, length: int, filling: Filling, *, flush: bool) -> int:
    """Copy all data into `target`, which keeps its attributes and is closed on errors; `source` is closed."""
    try:
        try:
            _copy_data(source, target, length, flush=flush)
        finally:
            filling.put_back(target)
        if flush:
            os.fsync(target)
    except BaseException:
        os.close(target)
        raise
    finally:
        _done_with(source)
    return target


def _done_with(source: int) -> None:
    """Close a file that was read. A network filesystem may say that this failed, which takes nothing from the copy; the
    kernel's copy-up lets go of its file without asking.
    """
    with contextlib.suppress(OSError):
        os.close(source)


def _copy_data(source: int, copy: int, length: int, *, flush: bool) -> None:
    if not length:
        return
    if length == os.fstat(source).st_size:
        try:
            fcntl.ioctl(copy, FICLONE, source)
            return
        except OSError as error:
            if error.errno not in (*_CANNOT, errno.ENOTTY, errno.EPERM):
                raise
    os.truncate(copy, length)
    offset = 0
    while offset < length:
        try:
            offset = os.lseek(source, offset, os.SEEK_DATA)
            end = min(length, os.lseek(source, offset, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # nothing but a hole from here on
            raise
        while offset < end:
            copied = _copy_extent(source, copy, offset, end - offset)
            if flush and copied >= _PIECE:
                start_flush(copy, offset, copied)
            offset += copied


def _copy_extent(source: int, copy: int, offset: int, count: int) -> int:
    """Copy some of `count` bytes at `offset`; return how many."""
    try:
        copied = os.copy_file_range(source, copy, min(count, _CHUNK), offset, offset)
        if copied:
            return copied
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    data = os.pread(source, min(count, _PIECE), offset)
    if not data:
        raise OSError(errno.EIO, "the lower file became shorter while it was copied up")
    return os.pwrite(copy, data, offset)


# Attributes


def _copy_xattrs(source: int | bytes, copy: int | bytes, carried: Carried) -> None:
    try:
        names = os.listxattr(source, follow_symlinks=False) if isinstance(source, bytes) else os.listxattr(source)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return
        raise
    follow = {"follow_symlinks": False} if isinstance(source, bytes) else {}
    for text in names:
        name = os.fsencode(text)
        to = carried(name)
        if to is None:
            continue
        try:
            os.setxattr(copy, to, os.getxattr(source, name, **follow), **follow)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP or marks.must_copy(name):
                raise


def carry(
    tree: Tree, layer: int, directory: int, name: bytes, st: os.stat_result, temporary: bytes, notes: dict[bytes, bytes]
) -> None:
    """Give a file in the work directory the owner, xattrs, mode and times of a layer's `name` in `directory`.

    They are `st`; `notes` are further xattrs.
    """
    owner = tree.own(st)
    os.chown(temporary, owner.uid, owner.gid, dir_fd=tree.work, follow_symlinks=False)
    copy = xattr_path(tree.work, temporary)
    _copy_xattrs(xattr_path(directory, name), copy, tree.carried(layer))
    for xattr, value in notes.items():
        os.setxattr(copy, xattr, value, follow_symlinks=False)
    if not stat.S_ISLNK(st.st_mode):
        os.chmod(temporary, owner.mode, dir_fd=tree.work)
    os.utime(temporary, ns=(st.st_atime_ns, st.st_mtime_ns), dir_fd=tree.work, follow_symlinks=False)


def _special(tree: Tree, node: Node, st: os.stat_result, source: int, place: tuple[int, bytes]) -> os.stat_result:
    """Copy a directory, symlink, device, FIFO or socket through the work directory; return the copy's attributes."""
    name, temporary = node.name, tree.temporary()
    kind = stat.S_IFMT(st.st_mode)
    if kind == stat.S_IFDIR:
        os.mkdir(temporary, 0o700, dir_fd=tree.work)
    elif kind == stat.S_IFLNK:
        os.symlink(os.readlink(name, dir_fd=source), temporary, dir_fd=tree.work)
    else:
        os.mknod(temporary, kind | 0o600, st.st_rdev, dir_fd=tree.work)
    try:
        carry(tree, node.layer, source, name, st, temporary, _notes(tree, node, st, source, name))
        if kind == stat.S_IFDIR:
            carry_flags_of_directory(source, name, tree.work, temporary, tree.prefix)
        if kind == stat.S_IFDIR and tree.sync == "strict":
            flush_directory(tree.work, temporary)
        done = os.stat(temporary, dir_fd=tree.work, follow_symlinks=False)
        os.rename(temporary, place[1], src_dir_fd=tree.work, dst_dir_fd=place[0])
    except OSError:
        (os.rmdir if kind == stat.S_IFDIR else os.unlink)(temporary, dir_fd=tree.work)
        raise
    return done


def flush_directory(parent: int, name: bytes) -> None:
    """fsync a directory by name."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
