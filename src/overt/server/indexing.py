"""The index directory when a mount begins: made or found, shown to belong to these layers, and cleaned.

An index that belongs to another upper, or an upper that has been over another lower layer, would give a file another
one's content: then the mount is refused (ovl_get_indexdir). Where handles cannot be had there is no index, and the
mount goes on without and says so.
"""

import os
import stat
from collections.abc import Sequence

from overt.overlay import index, marks
from overt.server.layers import Refusal, bequeath_nothing, remove_tree
from overt.tree.handles import Handles, handle_in_upper
from overt.tree.layer import Layer, xattr_path

_NAME = b"index"


def open_index(base: int, layers: Sequence[Layer], work: str, *, user_xattr: bool) -> tuple[int, str]:
    """The descriptor of the index in the work directory `base`, or -1 and the reason; raise `Refusal`."""
    if user_xattr:
        return -1, "index=off: it needs trusted xattrs, which are not to be had here (userxattr)"
    handles = Handles(layers, nameless=True)
    try:
        problem = handles.problem(layers[0])
        if problem:
            return -1, f"index=off: {problem}"
        try:
            return _open(base, layers, handles), ""
        except OSError as error:
            raise Refusal(f"workdir {work}: index=on: {error.strerror} (index=off mounts without)") from None
    finally:
        handles.close()


def _open(base: int, layers: Sequence[Layer], handles: Handles) -> int:
    upper, lower = layers[0], layers[1]
    below = handles.of(lower, lower.root, b"")
    _verify(upper, upper.root, marks.ORIGIN, below, "upperdir has been over another lowerdir")
    try:
        os.mkdir(_NAME, 0, dir_fd=base)
        bequeath_nothing(xattr_path(base, _NAME))
    except FileExistsError:
        pass
    fd = os.open(_NAME, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=base)
    try:
        owner = handle_in_upper(upper)
        if upper.mark(fd, b".", marks.ORIGIN) is not None:  # of a kernel before 4.16
            _verify(upper, fd, marks.ORIGIN, owner, "the index belongs to another upperdir")
        _verify(upper, fd, marks.UPPER, owner, "the index belongs to another upperdir")
        _clean(fd, upper, handles)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _verify(upper: Layer, directory: int, mark: bytes, handle: bytes, otherwise: str) -> None:
    """A directory of the upper carries this handle, from now on if it has none yet (ovl_verify_set_fh)."""
    value = upper.mark(directory, b".", mark)
    if value is None:
        os.setxattr(xattr_path(directory, b"."), upper.prefix + mark, handle)
    elif value != handle:
        raise Refusal(f"index=on: {otherwise}: mount with index=off, or with an upperdir and a workdir that are new")


def _clean(fd: int, upper: Layer, handles: Handles) -> None:
    """Remove what no file needs any more (ovl_indexdir_cleanup)."""
    directory = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    try:
        for text in os.listdir(directory):
            name = os.fsencode(text)
            if name.startswith(index.TEMPORARY):
                remove_tree(directory, text)
            elif not _is_needed(directory, name, upper, handles):
                os.unlink(name, dir_fd=directory)
    finally:
        os.close(directory)


def _is_needed(directory: int, name: bytes, upper: Layer, handles: Handles) -> bool:
    """Whether an entry is to stay; `Refusal` for what is none (ovl_verify_index).

    Whiteouts and directories are for nfs_export=on, and not looked at without it. One that nothing is linked to can
    still be needed by names that only a lower layer has.
    """
    try:
        handle = index.handle_of(name)
    except ValueError:
        raise Refusal(f"index=on: {os.fsdecode(name)!r} in the index is no entry of one: remove it") from None
    st = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if stat.S_ISDIR(st.st_mode) or marks.is_whiteout(st.st_mode, st.st_rdev):
        return True
    of = upper.mark(directory, name, marks.ORIGIN)
    if of is None or not handles.can_follow(handle):  # nobody knows what it is, and it may be all that there is of it
        why = "does not say of which file it is" if of is None else "is of a filesystem that is not here"
        raise Refusal(f"index=on: {os.fsdecode(name)} in the index {why}: restore its xattrs, or mount with index=off")
    if of != handle:
        return False
    if st.st_nlink > 1:
        return True
    lower = handles.lower(handle)
    if lower is None:
        return False
    return index.union(upper.mark(directory, name, marks.NLINK), lower.st_nlink, st.st_nlink) is not None
