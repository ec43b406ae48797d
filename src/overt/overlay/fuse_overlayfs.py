"""The options of fuse-overlayfs(1) and of the FUSE library under it (1.10 to 1.16), and what becomes of each here.

One table, TAKEN. What is in neither it nor overt's own options is passed over with a warning, as fuse-overlayfs does:
its callers count on it.
"""

from typing import NamedTuple

from overt.overlay import options
from overt.overlay.options import OptionError, Options

OWN = {
    "lowerdir=", "upperdir=", "workdir=", "uidmapping=", "gidmapping=", "squash_to_root", "squash_to_uid=",
    "squash_to_gid=", "static_nlink", "noacl", "noxattrs=", "timeout=", "context=", "volatile", "ro", "nosuid", "nodev",
    "noexec", "userxattr", "unseen=", "nopassthrough", "redirect_dir=", "metacopy=", "index=", "nfs_export=",
    "xino=", "whiteouts=", "xattr_permissions=",
    "atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime",
}  # fmt: skip
"""what means the same in `overt mount`"""

IGNORED = {
    "threaded=": "threads", "max_idle_threads": "threads", "max_threads": "threads", "clone_fd": "threads",
    "writeback=": "caching", "kernel_cache": "caching", "auto_cache": "caching", "fast_ino=": "caching",
    "splice_read": "copying", "splice_write": "copying", "splice_move": "copying", "no_splice_read": "copying",
    "no_splice_write": "copying", "no_splice_move": "copying", "async_read": "copying", "sync_read": "copying",
    "max_read=": "copying", "max_write=": "copying", "max_readahead=": "copying", "max_background=": "copying",
    "congestion_threshold=": "copying",
    "allow_other": "access", "allow_root": "access", "default_permissions": "access",
    "lazytime": "access times", "nolazytime": "access times",
    "debug": "names", "fsname=": "names", "subtype=": "names", "auto_unmount": "names",
    "nfs_filehandles=": "inode numbers", "ino32_t": "inode numbers",
}  # fmt: skip
"""what is taken and changes nothing, and the line of docs/fuse-overlayfs.md that says why"""

_REFUSED = {
    "plugins": "plugins= are programs of fuse-overlayfs, which overt cannot load: mount without",
}


class Understood(NamedTuple):
    """Options, and those that were passed over."""

    options: Options
    unknown: list[str]


def parse(text: str) -> Understood:
    """Read the text of fuse-overlayfs's -o, of several the later counts; raise OptionError."""
    # The one is libfuse's default. The other is how containers/storage unpacks layers for a mount_program.
    kept = {"nodev": "nodev", "whiteouts": "whiteouts=oci"}
    unknown = []
    for item in options.items(text):
        key, equals, value = item.partition("=")
        name = key + equals
        if item in options.OPPOSITES:
            kept.pop(options.OPPOSITES[item], None)
        elif name in OWN:
            kept[key] = item
        elif name in ("fsync=", "sync="):
            kept["fsync"] = f"fsync={value}"
        elif key in _REFUSED and value not in ("", "0", "off"):
            raise OptionError(f"{item}: {_REFUSED[key]}")
        elif not {item, name, key} & {*IGNORED, *_REFUSED}:
            unknown.append(item)
    if kept.get("lowerdir", "lowerdir=") == "lowerdir=":
        raise OptionError("no lowerdir specified: give -o lowerdir=DIR[:DIR...]")
    if "upperdir" not in kept:
        for key in ("workdir", "volatile", "fsync"):
            kept.pop(key, None)
    if "volatile" in kept:
        kept.pop("fsync", None)
    understood = options.understand(kept.values())
    # A layer that is named again below itself shows nothing that is not there already.
    return Understood(understood._replace(lower=tuple(dict.fromkeys(understood.lower))), unknown)
