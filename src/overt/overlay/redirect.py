"""Redirects: where the lower part of something that was renamed is to be found (fs/overlayfs/namei.c, dir.c).

A redirect is the value of an xattr. ``name`` stands for another name in the same directory, ``/a/name`` for a path from
the roots of the layers below; both are names of the *lower* tree, as it was when the thing was renamed. Following one
is like following a symlink that no permission guards, so it can be switched off (redirect_dir=nofollow).
"""

import errno
import os
from collections.abc import Iterable

LONGEST = 256
"""bytes of an absolute redirect that is written; the kernel's default (redirect_max)"""

ON, FOLLOW, NOFOLLOW, OFF = "on", "follow", "nofollow", "off"
MODES = (ON, FOLLOW, NOFOLLOW, OFF)
"""redirect_dir=; ``off`` is ``follow``, as in a kernel built as it comes (OVERLAY_FS_REDIRECT_ALWAYS_FOLLOW)"""

_LEADS_OUT = (b"", b".", b"..")


def checked(value: bytes) -> bytes:
    """A redirect as it is in the xattr, if it is one; EINVAL for what is none."""
    value = value.partition(b"\0")[0]
    names = value[1:].split(b"/") if value.startswith(b"/") else [value]
    if b"" in names or (b"/" in value and not value.startswith(b"/")):
        raise OSError(errno.EINVAL, "an invalid redirect")
    return value


def checked_name(name: bytes) -> bytes:
    """One name on the way that a redirect leads; EACCES for one that would lead out of the layer."""
    if name in _LEADS_OUT:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    return name


def onward(path: bytes, element: bytes, rest: bytes, value: bytes) -> bytes:
    """Where the layers below are to be searched, when `element` of `path` carries the redirect `value`.

    `rest` is what follows the element in the path, with its slash, or nothing.
    """
    if value.startswith(b"/"):
        return value + rest
    return path[: len(path) - len(element) - len(rest)] + value + rest


def absolute(steps: Iterable[tuple[bytes, bytes | None]]) -> bytes | None:
    """The redirect of something from the root; None if it would be too long (ovl_get_redirect).

    `steps`: (name, redirect or None) of the thing and of each directory above it, upwards, without the root.
    """
    path = b""
    for name, redirect in steps:
        path = (redirect or name) + path
        if path.startswith(b"/"):
            break
        path = b"/" + path
    return path if len(path) <= LONGEST else None
