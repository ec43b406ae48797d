"""What is said of a mount and of an upper: at its end (rule 10), and in `overt status`."""

import os
import threading
import time
from typing import Any

from overt.server.mount import Mount
from overt.server.syncing import NAMED
from overt.upper import Upper

_SHOWN = 20
"""how many lost files of a mount its status names"""


def flush(mount: Mount) -> OSError | None:
    """Flush an ordinary mount's upper, or look at a volatile one's; return why that failed. Waits for the disk."""
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

    mount.upper.flush(flushed)
    done.wait()
    return failed[0]


def verdict(mount: Mount, failure: OSError | None) -> dict[str, Any]:
    """What became of a mount's data, by what is known after a flush that came to `failure`."""
    errors = mount.account.count if mount.account is not None else 0
    lost = sorted(set(mount.lost) | set(_lost_by_inode(mount)))
    record: dict[str, Any] = {
        "mount": mount.target,
        "volatile": mount.volatile,
        "flushed": mount.upper is not None and not mount.volatile and failure is None,
        "errors": errors,
    }
    if lost:
        named = {"files": lost[:NAMED], "perhaps_more": len(lost) >= NAMED}
        return record | {"verdict": "lost"} | named
    return record | {"verdict": "may be lost" if errors or failure else "no error recorded"}


def _lost_by_inode(mount: Mount) -> list[str]:
    """Files of this mount that the tracepoint saw fail."""
    if mount.upper is None or mount.account is None:
        return []
    inodes = mount.upper.failed(mount.account.mounted_at)
    if not inodes:
        return []
    root = f"/proc/self/fd/{mount.tree.layers[0].root}"
    found = []
    for directory, _, files in os.walk(root):
        for name in files:
            path = os.path.join(directory, name)
            try:
                if os.lstat(path).st_ino in inodes:
                    found.append(path[len(root) :])
            except OSError:
                continue  # removed or unreadable meanwhile: it cannot be named
    return found


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
