"""What is said of a mount and of an upper: at its end (rule 10), and in `overt status`."""

import errno
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from overt.host.btrfs import has_subvolumes
from overt.host.files import birth_time
from overt.server.mount import Mount
from overt.server.syncing import NAMED
from overt.upper import Upper

WELL = "no error recorded"
"""the verdict on a mount of whose data nothing bad is known"""
_SHOWN = 20
"""how many lost files of a mount its status names"""


def flush(mount: Mount, seconds: float | None = None) -> OSError | None:
    """Flush an ordinary mount's upper, or look at a volatile one's; return why that failed. Waits for the disk.

    ETIMEDOUT if the disk does not answer within `seconds`.
    """
    if mount.upper is None:
        return None
    if mount.volatile:
        mount.upper.check()
        return None
    failed: list[OSError | None] = []
    done = threading.Event()

    def flushed(error: OSError | None) -> None:
        failed.append(error)
        done.set()

    try:
        mount.upper.flush(flushed)
    except RuntimeError as error:  # no more threads
        return OSError(errno.EAGAIN, str(error))
    if not done.wait(seconds):
        return OSError(errno.ETIMEDOUT, f"no answer from its disk in {seconds:g} s")
    return failed[0]


def verdict(mount: Mount, failure: OSError | None) -> dict[str, Any]:
    """What became of a mount's data, by what is known after a flush that came to `failure`."""
    errors = mount.account.count if mount.account is not None else 0
    record: dict[str, Any] = {
        "mount": mount.target,
        "volatile": mount.volatile,
        "flushed": mount.upper is not None and not mount.volatile and failure is None,
        "errors": errors,
    }
    if failure is not None:
        record["why"] = failure.strerror or str(failure)
    seen = _lost_by_inode(mount)
    lost = sorted({*mount.lost, *seen.certain})
    files = lost or sorted(seen.doubtful)
    if files:
        more = len(files) >= NAMED or not seen.is_all or bool(lost and {*seen.doubtful} - {*lost})
        record |= {"files": files[:NAMED], "perhaps_more": more}
    if lost:
        return record | {"verdict": "lost"}
    return record | {"verdict": "may be lost" if errors or failure else WELL}


class _Seen(NamedTuple):
    """Files of a mount whose inode numbers are of those that the tracepoint saw fail."""

    certain: list[str]
    doubtful: list[str]
    """it may have been another file that had this number: before, or in another subvolume"""
    is_all: bool
    """whether all that failed is known"""


def _lost_by_inode(mount: Mount) -> _Seen:
    if mount.upper is None or mount.account is None or not mount.account.count:
        return _Seen([], [], True)
    inodes = mount.upper.failed(mount.account.mounted_at, newest=True)
    certain: list[str] = []
    doubtful: list[str] = []
    unread: list[OSError] = []
    if not inodes:
        return _Seen(certain, doubtful, inodes is not None)
    top = mount.tree.layers[0].root
    unique = _has_unique_numbers(top, mount.upper)
    offset = time.time() - time.monotonic()
    for directory, path, name in _files(top, unread):
        try:
            failed = inodes.get(os.lstat(name, dir_fd=directory).st_ino)
            born = birth_time(directory, os.fsencode(name)) if failed is not None else None
        except OSError as error:
            unread.append(error)
            continue
        if failed is None or (born is not None and born > failed.last + offset):
            continue  # younger than the last event: the number was another file's then
        (certain if unique and born is not None else doubtful).append(path)
    return _Seen(certain, doubtful, all(error.errno == errno.ENOENT for error in unread))  # removed meanwhile


def _files(top: int, unread: list[OSError]) -> Iterator[tuple[int, str, str]]:
    """All below a directory that are none: their directory, their path from `top`, their name.

    By one name at a time, since a path may be longer than the kernel takes. `unread`: why some are not found.
    """
    todo: list[tuple[int, str, str]] = [(top, "", ".")]
    try:
        while todo:
            above, path, name = todo.pop()
            if not name:
                os.close(above)
                continue
            try:
                directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
                todo.append((directory, path, ""))
                with os.scandir(directory) as entries:
                    for entry in entries:
                        below = (directory, f"{path}/{entry.name}", entry.name)
                        if entry.is_dir(follow_symlinks=False):
                            todo.append(below)
                        else:
                            yield below
            except OSError as error:
                unread.append(error)
    finally:
        for directory, _, name in todo:
            if not name:
                os.close(directory)


def _has_unique_numbers(directory: int, upper: Upper) -> bool:
    """Whether a number is one file's on all of the upper: each subvolume of btrfs has numbers of its own."""
    if os.fstat(directory).st_dev == upper.s_dev:
        return True
    try:
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
        try:
            return not has_subvolumes(fd)
        finally:
            os.close(fd)
    except OSError:  # not allowed to know, or not btrfs
        return False


def mount_status(mount: Mount) -> dict[str, Any]:
    """A mount, as `overt status --json` has it."""
    return {
        "target": mount.target,
        "lower": list(mount.options.lower),
        "upper": mount.options.upper,
        "device": device(mount.upper) if mount.upper else None,
        "fsync": mount.options.fsync,
        "kind": mount.kind,
        "passthrough": mount.passthrough,
        "syncfs": mount.tells_syncfs,
        "since": mount.since,
        "seconds": round(time.time() - mount.since, 1),
        "nodes": len(mount.tree.nodes),
        "open": len(mount.handles),
        "errors": mount.account.count if mount.account else 0,
        "told": mount.account.told if mount.account else 0,
        "lost": list(mount.lost)[-_SHOWN:],
        "lost_files": len(mount.lost),
    }


def upper_status(upper: Upper) -> dict[str, Any]:
    """An upper, as `overt status --json` has it."""
    ledger = upper.ledger
    return {
        "device": device(upper),
        "eyes": upper.eyes,
        "flushes": upper.flushes,
        "taken_from_host": upper.taken,
        "recorded": ledger.count,
        "errors": [{**error._asdict(), "told": ledger.told(error)} for error in ledger.errors],
    }


def device(upper: Upper) -> str:
    """MAJOR:MINOR of an upper filesystem."""
    return f"{os.major(upper.s_dev)}:{os.minor(upper.s_dev)}"
