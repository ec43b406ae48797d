"""The end of a mount: the last flush, and the verdict on its data (rule 10), whoever unmounts it.

When the last of a mount's places and open files has gone, the kernel says goodbye to a fuseblk server (DESTROY), and
whatever was the end of it waits for the answer: umount(2), a container's last process, the last close(2) after
`umount -l`. So what was written is flushed before the answer, as kernel overlayfs does it in umount(2). SYNCFS is no
help: the kernel does not send it to a superblock that is being taken down (fs/fuse/inode.c, fuse_sync_fs).

Who waits holds s_umount of that superblock (fs/super.c, deactivate_super), for which every sync(2) of the machine waits
in turn, and cannot be killed (fuse_send_destroy). Therefore a thread of its own waits for the disk, and not for ever.
If it is one of our own threads that waits, an answer has to come before this process ends: killed, such a thread keeps
the connection open for whose answer it waits. `Mount.hurry` is for that.

To a plain fuse server nothing is said, and nothing after the connection was aborted; then the flush is made when the
mount is closed, and nobody waits for it.
"""

import errno
import os
import threading
import time
from typing import Any

from overt.fuse.request import Request
from overt.host import mounts
from overt.server import registry, report
from overt.server.identity import become_myself
from overt.server.mount import Mount

PATIENCE = 60.0
"""seconds in which the disk has to answer"""
LAST_SERVED = 10.0
"""seconds for a mount to be closed with which the kernel is done"""
_GOODBYE = 0.2
"""seconds for the kernel to be done with a mount that was taken down, if it is nowhere else"""
_PAUSE = 1e-3


def destroy(mount: Mount, request: Request) -> bytes | None:
    """DESTROY: the last request, of fuseblk only. Answered after the last flush, by a thread of its own."""
    mount.farewell = request.unique
    mount.destroyed = True
    if mount.record is None and not mount.hurried and mount.begin():
        try:
            threading.Thread(target=_part, args=(mount,), daemon=True).start()
            return None
        except RuntimeError as error:  # no more threads: it is flushed when it is closed
            mount.end()
            mount.events.say("unmounted before it is flushed", mount=mount.target, why=str(error))
    mount.part()
    return None


def _part(mount: Mount) -> None:
    become_myself()
    last_flush(mount)
    mount.part()
    mount.end()


def last_flush(mount: Mount) -> None:
    """Flush a mount with which the kernel is done, and make the verdict, unless that was done. Raises nothing."""
    try:
        conclude(mount)
    except Exception:
        mount.events.crash(f"the last flush of {mount.target}")


def conclude(mount: Mount) -> dict[str, Any]:
    """The verdict on a mount with which the kernel is done: made, and made an event, by the first who asks for it.

    Waits for the disk, for as long as `PATIENCE` at most.
    """
    with mount.ending:
        if mount.record is None:
            failure = report.flush(mount, PATIENCE)
            mount.part()
            mount.record = report.verdict(mount, failure)
            aborted = mount.kind == "fuseblk" and not mount.destroyed
            mount.events.say("aborted" if aborted else "unmounted", **mount.record)
        return mount.record


def is_covered(mount: Mount) -> bool:
    """Whether something else is at its place, mounted over it, say, which umount(2) would take away instead."""
    try:
        return os.stat(mount.target).st_dev != mount.device
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # its own error: the connection was aborted, or the upper has shut down
        return False


def follow(mount: Mount) -> bool:
    """Note where a mount is now that was moved, or a directory above it; False if it is where it was, or nowhere."""
    places = registry.places_of(mount.device)
    if not places or mount.target in places:
        return False
    mount.target = places[-1]
    return True


def is_over(mount: Mount) -> bool:
    """Whether the kernel is done with a mount that was taken down, or is in a moment: it may be somewhere else, too."""
    ours = mount.reopening is not None or mount.settling.locked()  # then we ourselves have it somewhere
    deadline = time.monotonic() + (LAST_SERVED if ours else _GOODBYE)
    while not mount.destroyed and not mount.gone:
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)
    return True


def take_down(mount: Mount) -> None:
    """Unmount it, unless somebody else was quicker. OSError."""
    with mount.leaving:
        if mount.placed and not mount.destroyed:
            if mount.hurried:
                raise OSError(errno.EBUSY, "the server is ending", mount.target)
            try:
                _umount(mount)
            except OSError:
                if not is_over(mount):
                    raise
        mount.placed = False


def _umount(mount: Mount) -> None:
    """umount(2); while an error is being put on the mount's cursor we are the ones who keep it busy."""
    if is_covered(mount):
        if mount.device not in registry.devices_at(mount.target):
            raise OSError(errno.EINVAL, "is not there any more (was it moved?): unmount it where it is", mount.target)
        raise OSError(errno.EBUSY, "something else is mounted over it: unmount that first", mount.target)
    try:
        mounts.umount(mount.target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        with mount.settling:  # not held across umount(2), which may have to wait for an error to be carried over
            pass
        mounts.umount(mount.target)
