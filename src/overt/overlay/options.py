"""Mount options, as ``mount -o`` has them."""

import os
from collections.abc import Iterable
from typing import NamedTuple

from overt.overlay import view
from overt.overlay.view import View

FSYNC_MODES = ("auto", "strict", "volatile")
UNSEEN_MODES = ("record", "refuse")

_IGNORED = {
    "rw", "dev", "suid", "exec", "async", "noatime", "relatime", "auto", "noauto", "user", "nouser", "users",
    "_netdev", "nofail", "defaults", "default_permissions", "allow_other",
}  # fmt: skip

_FLAGS = {"ro", "volatile", "nopassthrough", "userxattr", "nosuid", "nodev", "noexec", "ociwhiteouts", *view.FLAGS}

_OFF = {"index", "redirect_dir", "metacopy", "nfs_export", "xino"}
"""what kernel overlayfs has and we do not: asking for none of it is all right"""


class OptionError(ValueError):
    """An option that cannot be used; the text names it and says what to do."""


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
    view: View = View()
    oci_whiteouts: bool = False
    """whiteouts of lower layers may be files called .wh.NAME"""

    def absolute(self) -> "Options":
        """The same with absolute paths: whoever mounts may have another working directory."""
        places = [None if path is None else os.path.abspath(path) for path in (self.upper, self.work)]
        return self._replace(lower=tuple(map(os.path.abspath, self.lower)), upper=places[0], work=places[1])

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


def parse(text: str, *, sloppy: bool = False) -> Options:
    """Read ``lowerdir=A:B,upperdir=U,workdir=W[,volatile|,fsync=auto|strict|volatile][,ro]...``; raise OptionError.

    `sloppy`: pass over options that are not known, as mount(8) -s wants.
    """
    return understand(items(text), sloppy=sloppy)


def understand(given: Iterable[str], *, sloppy: bool = False) -> Options:
    """The same of single options."""
    values: dict[str, str] = {}
    flags: set[str] = set()
    for item in given:
        key, equals, value = item.partition("=")
        if key in ("lowerdir", "upperdir", "workdir", "fsync", "unseen", *view.VALUES):
            if not value:
                raise OptionError(f"{key}= needs a value")
            if values.get(key, value) != value:
                raise OptionError(f"{key}= is given twice")
            values[key] = value
        elif not equals and key in _FLAGS:
            flags.add(key)
        elif item not in _IGNORED and not (key in _OFF and value == "off") and not sloppy:
            raise OptionError(f"unknown option {item!r} (overt mount --help lists them)")
    fsync = values.get("fsync", "volatile" if "volatile" in flags else "auto")
    _one_of("fsync", fsync, FSYNC_MODES)
    _one_of("unseen", values.get("unseen", "record"), UNSEEN_MODES)
    if "volatile" in flags and fsync != "volatile":
        raise OptionError(f"volatile and fsync={fsync} contradict each other: give one of them")
    if "lowerdir" not in values:
        raise OptionError("lowerdir= is missing: name at least one lower layer")
    lower = tuple(split(values["lowerdir"], ":"))
    if not all(lower):
        raise OptionError("lowerdir= has an empty layer (write \\: for a colon in a name)")
    upper, work = values.get("upperdir"), values.get("workdir")
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
    return Options(
        lower, upper, work, fsync, "ro" in flags or upper is None, values.get("unseen", "record"),
        "nopassthrough" not in flags, "userxattr" in flags, "nosuid" in flags, "nodev" in flags, "noexec" in flags,
        shown, "ociwhiteouts" in flags,
    )  # fmt: skip


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


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{key}={value}: not one of {', '.join(allowed)}")
