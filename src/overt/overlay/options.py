"""Mount options, as ``mount -o`` has them."""

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from overt.overlay import redirect, view
from overt.overlay.view import View

FSYNC_MODES = ("auto", "strict", "volatile")
UNSEEN_MODES = ("record", "refuse")
_ON_OFF = ("on", "off")
_CHOICES = {
    "fsync": FSYNC_MODES, "unseen": UNSEEN_MODES, "redirect_dir": redirect.MODES, "metacopy": _ON_OFF,
    "index": _ON_OFF, "nfs_export": _ON_OFF, "whiteouts": ("overlay", "oci"),
    # Inode numbers are unique in all of them: a FUSE mount has one st_dev, by which alone they could differ.
    "xino": ("auto", "on", "off"),
}  # fmt: skip
_FSYNC_NUMBERS = {"0": "volatile", "1": "auto"}
"""fsync= as fuse-overlayfs has it"""

OPPOSITES = {"suid": "nosuid", "dev": "nodev", "exec": "noexec", "symfollow": "nosymfollow", "rw": "ro"}
"""options that take back another one"""
_IGNORED = {
    "async", "auto", "noauto", "user", "nouser", "users",
    "_netdev", "nofail", "defaults", "default_permissions", "allow_other",
    "lazytime", "nolazytime", "silent", "loud", "dirsync", "iversion", "noiversion", "mand", "nomand",
}  # fmt: skip

_VALUED = {
    "lowerdir": "DIR[:DIR...]", "upperdir": "a directory", "workdir": "a directory",
    **{key: " or ".join(words) for key, words in _CHOICES.items()}, **view.VALUES,
}  # fmt: skip
"""options with a value, and which"""
_REPEATED = {"lowerdir+": "a directory", "datadir+": "a directory"}

_FLAGS = {"ro", "volatile", "nopassthrough", "userxattr", "nosuid", "nodev", "noexec", "nosymfollow", *view.FLAGS}

LASTING = {"volatile", "nopassthrough", "userxattr", *_CHOICES, "lowerdir", "upperdir", "workdir", *_REPEATED}
"""options of the overlay itself, which hold as long as it is mounted"""

_REFUSED = {"sync": "nothing would be written back at each write: leave it out, and call fsync or syncfs"}

_ATIME = {
    "relatime": "relatime", "norelatime": "relatime", "atime": "relatime", "nostrictatime": "relatime",
    "noatime": "noatime", "strictatime": "strictatime",
}  # fmt: skip
"""when reading changes the access time, the last one counting (mount(8))"""


SOURCE = "overt"
"""what a mount is called where mounts are listed, if nobody says otherwise"""


def is_source(word: str) -> bool:
    """Whether a mount can be called so: not a path, which could be found to lead somewhere."""
    return "/" not in word and word not in ("", ".", "..") and len(os.fsencode(word)) <= 255


class OptionError(ValueError):
    """An option that cannot be used; the text names it and says what to do."""


class UnknownOption(OptionError):
    """One that there is not; where they are listed depends on who asks."""


class Options(NamedTuple):
    """What a mount is asked to be."""

    lower: tuple[str, ...]
    """uppermost first"""
    upper: str | None
    work: str | None
    fsync: str = "auto"
    read_only: bool = False
    unseen: str = "record"
    passthrough: bool = True
    user_xattr: bool = False
    """marks are user.overlay.* instead of trusted.overlay.*"""
    no_suid: bool = False
    no_dev: bool = False
    no_exec: bool = False
    no_symfollow: bool = False
    atime: str = "relatime"
    dir_atime: bool = True
    redirect_dir: str = redirect.FOLLOW
    metacopy: bool = False
    indexed: bool = False
    """a hard link of a lower layer stays one file when it is copied up (overt.overlay.index)"""
    whiteout_files: bool = False
    """lower layers may have whiteouts as image layers have them (overt.overlay.images)"""
    data: tuple[str, ...] = ()
    """data-only lower layers"""
    view: View = View()
    source: str = SOURCE
    """what the mount is called where mounts are listed; a name, and no path"""

    def absolute(self) -> "Options":
        """The same with absolute paths: whoever mounts may have another working directory."""
        places = [None if path is None else os.path.abspath(path) for path in (self.upper, self.work)]
        lower, data = (tuple(map(os.path.abspath, paths)) for paths in (self.lower, self.data))
        return self._replace(lower=lower, data=data, upper=places[0], work=places[1])

    def with_user_xattrs(self) -> "Options":
        """The same with marks that whoever owns a file can make: what they say of other files is not believed.

        Raises OptionError if that was asked for (ovl_fs_params_verify).
        """
        if self.metacopy or self.redirect_dir == redirect.ON:
            asked = "metacopy=on" if self.metacopy else "redirect_dir=on"
            raise OptionError(f"{asked} needs trusted xattrs: leave it out where they cannot be had (userxattr)")
        return self._replace(user_xattr=True, redirect_dir=redirect.NOFOLLOW)

    @property
    def volatile(self) -> bool:
        """Whether nothing of the fsync family flushes."""
        return self.fsync == "volatile"


def split(text: str, separator: str) -> list[str]:
    """Split at `separator`, except where a backslash stands before it; the backslashes are taken out.

    Kernel overlayfs's rule for ``:`` in lowerdir and ``,`` in paths (ovl_next_opt, ovl_parse_layer).
    """
    parts = [""]
    characters = iter(text)
    for character in characters:
        if character == "\\":
            following = next(characters, "\\")
            parts[-1] += following if following in (separator, "\\") else "\\" + following
        elif character == separator:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def unescape(directory: str) -> str:
    """The name that upperdir= or workdir= has: a backslash goes from before whatever it stands (ovl_unescape)."""
    return re.sub(r"\\(.)", r"\1", directory, flags=re.DOTALL)


def parse(text: str, *, sloppy: bool = False) -> Options:
    """Read ``lowerdir=A:B,upperdir=U,workdir=W[,volatile|,fsync=auto|strict|volatile][,ro]...``; raise OptionError.

    `sloppy`: pass over options that are not known, as mount(8) -s wants.
    """
    return understand(items(text), sloppy=sloppy)


def understand(given: Iterable[str], *, sloppy: bool = False) -> Options:
    """The same of single options."""
    values: dict[str, str] = {}
    repeated: dict[str, list[str]] = {key: [] for key in _REPEATED}
    flags: set[str] = set()
    atime, dir_atime = "relatime", True
    for item in given:
        key, equals, value = item.partition("=")
        if key in _VALUED or key in _REPEATED:
            if not value:
                raise OptionError(f"{key}= needs a value: {_VALUED.get(key) or _REPEATED[key]}")
            if key in _REPEATED:
                repeated[key].append(value)
                continue
            if key == "fsync":
                value = _FSYNC_NUMBERS.get(value, value)
            if values.get(key, value) != value:
                raise OptionError(f"{key}= is given twice")
            values[key] = value
        elif not equals and key in _FLAGS:
            flags.add(key)
        elif item in OPPOSITES:
            flags.discard(OPPOSITES[item])
        elif item in _ATIME:
            atime = _ATIME[item]
        elif item in ("diratime", "nodiratime"):
            dir_atime = item == "diratime"
        elif item in _REFUSED and not sloppy:
            raise OptionError(f"{item}: {_REFUSED[item]}")
        elif item not in _IGNORED and not sloppy:
            raise UnknownOption(f"unknown option {item!r}")
    fsync = values.get("fsync", "volatile" if "volatile" in flags else "auto")
    for key, allowed in _CHOICES.items():
        if values.get(key, allowed[0]) not in allowed:
            raise OptionError(f"{key}={values[key]}: not one of {', '.join(allowed)}")
    if values.get("nfs_export") == "on":
        raise OptionError("nfs_export=on: file handles of a FUSE mount do not outlast it: leave the option out")
    if "volatile" in flags and fsync != "volatile":
        raise OptionError(f"volatile and fsync={fsync} contradict each other: give one of them")
    metacopy = values.get("metacopy") == "on"
    redirect_dir = values.get("redirect_dir", redirect.ON if metacopy else redirect.FOLLOW)
    if metacopy and redirect_dir != redirect.ON:
        raise OptionError(
            f"metacopy=on and redirect_dir={redirect_dir} contradict each other: it needs redirect_dir=on"
        )
    lower, data = _lower(values.get("lowerdir"), repeated["lowerdir+"], repeated["datadir+"])
    upper, work = (unescape(values[key]) if key in values else None for key in ("upperdir", "workdir"))
    if upper and not work:
        raise OptionError("upperdir= needs workdir=, an empty directory on the same filesystem")
    if work and not upper:
        raise OptionError("workdir= is given without upperdir=")
    if fsync == "volatile" and not upper:
        raise OptionError("volatile says how an upper is treated, and there is no upperdir=")
    try:
        shown = view.parse(values, flags)
    except ValueError as error:
        raise OptionError(str(error)) from None
    options = Options(
        lower,
        upper,
        work,
        fsync,
        read_only="ro" in flags or upper is None,
        unseen=values.get("unseen", "record"),
        passthrough="nopassthrough" not in flags,
        no_suid="nosuid" in flags,
        no_dev="nodev" in flags,
        no_exec="noexec" in flags,
        no_symfollow="nosymfollow" in flags,
        atime=atime,
        dir_atime=dir_atime,
        redirect_dir=redirect_dir,
        metacopy=metacopy,
        indexed=values.get("index") == "on" and upper is not None,
        whiteout_files=values.get("whiteouts") == "oci",
        data=data,
        view=shown,
    )
    if "userxattr" not in flags:
        return options
    if values.get("redirect_dir") == redirect.FOLLOW:
        raise OptionError("redirect_dir=follow and userxattr contradict each other: give one of them")
    return options.with_user_xattrs()


def _lower(text: str | None, more: list[str], data: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The lower layers and the data-only ones: ``A:B::D1::D2``, or one by one."""
    if text is None and not more:
        raise OptionError("lowerdir= is missing: name at least one lower layer")
    if text is not None and more:
        raise OptionError("lowerdir= and lowerdir+= contradict each other: use one way of naming layers")
    parts = split(text, ":") if text is not None else more
    merged = parts[: parts.index("")] if "" in parts else parts
    rest = parts[len(merged) :]
    if not merged or any(bool(part) != bool(place % 2) for place, part in enumerate(rest)) or len(rest) % 2:
        raise OptionError(
            "lowerdir= has an empty layer, or a layer after a data-only one that is none (A:B::D1::D2; write \\: for a "
            "colon in a name)"
        )
    return tuple(merged), (*rest[1::2], *data)


def items(text: str) -> list[str]:
    """The options of `text`; a comma after a backslash belongs to a value, and other backslashes stay for later.

    A SELinux context, which has commas too, comes in quotes (mount(8)).
    """
    found = [""]
    escaped = quoted = False
    for character in text:
        if character == '"' and (quoted or found[-1].endswith("context=")):
            quoted = not quoted
        if character == "," and not escaped and not quoted:
            found.append("")
        elif character == "," and escaped:
            found[-1] = found[-1][:-1] + ","
        else:
            found[-1] += character
        escaped = character == "\\" and not escaped
    return [item for item in found if item]
