"""Seccomp profiles in which syncfs(2) is the agent's to answer.

Two formats are in use. A profile as podman and docker read it (the containers' seccomp.json: `archMap`, `includes`) and
the `linux.seccomp` of an OCI config.json (`architectures`). Both have `syscalls`, rules of names, an action and, maybe,
conditions; a rule that names syncfs is taken apart and a rule of our own added.
"""

import json
import os
from pathlib import Path
from typing import Any

CALL = "syncfs"
NOTIFY = "SCMP_ACT_NOTIFY"
_ALLOW = "SCMP_ACT_ALLOW"
_HARMLESS = {_ALLOW, "SCMP_ACT_LOG", "SCMP_ACT_TRACE"}
_LESSER = {"SCMP_ARCH_X86_64": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"], "SCMP_ARCH_AARCH64": ["SCMP_ARCH_ARM"]}
_OURS = "SCMP_ARCH_AARCH64" if os.uname().machine == "aarch64" else "SCMP_ARCH_X86_64"
MINIMAL: dict[str, Any] = {
    "defaultAction": _ALLOW,
    "architectures": [_OURS, *_LESSER[_OURS]],
    "syscalls": [],
}
"""filters nothing else"""


class ProfileError(ValueError):
    """Why no profile can be made of the one that was given."""


def make(base: dict[str, Any], socket: str) -> dict[str, Any]:
    """`base` with syncfs notified to the agent that listens on `socket` (an absolute path). Raises ProfileError.

    Refused: a profile that does not name an architecture's 32-bit kinds (libseccomp's filter kills whoever makes a call
    of a kind that it was not told of); one that notifies somebody else, as a container has one listener only.
    """
    if not socket.startswith("/"):
        raise ProfileError(f"the socket has to be an absolute path: {socket}")
    other = base.get("listenerPath")
    if other and other != socket:
        raise ProfileError(f"its calls are notified to another agent: {other}")
    _refuse_lesser(base)
    rules = []
    for rule in base.get("syscalls") or []:
        names = [name for name in _names(rule) if name != CALL]
        if rule.get("action") == NOTIFY and names:
            raise ProfileError(f"it notifies other calls: {', '.join(names)}")
        if len(names) == len(_names(rule)):
            rules.append(rule)
        elif names:
            rules.append({**{key: value for key, value in rule.items() if key != "name"}, "names": names})
    rules.append({"names": [CALL], "action": NOTIFY})
    return {**base, "listenerPath": socket, "syscalls": rules}


def load(path: str | None) -> dict[str, Any]:
    """The profile in a file, or MINIMAL; of a whole OCI config.json, its `linux.seccomp`. OSError, ProfileError."""
    if path is None:
        return dict(MINIMAL)
    try:
        base = json.loads(Path(path).read_text())
        if "ociVersion" in base:
            base = base["linux"].get("seccomp", MINIMAL)
        if "defaultAction" not in base:
            raise ProfileError(f"{path}: no defaultAction: not a seccomp profile")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProfileError(f"{path}: not a seccomp profile: {error}") from None
    return dict(base)


def _names(rule: dict[str, Any]) -> list[str]:
    return list(rule.get("names") or ([rule["name"]] if "name" in rule else []))


def _refuse_lesser(base: dict[str, Any]) -> None:
    """32-bit calls have to be in the filter: a program that makes one is killed else, and syncfs would not be ours."""
    if base.get("archMap"):
        known = {row["architecture"]: set(row.get("subArchitectures") or []) for row in base["archMap"]}
        rows = {arch: known[arch] for arch in _LESSER if arch in known}
    else:
        given = set(base.get("architectures") or [])
        rows = {arch: given for arch in _LESSER if arch in given}
        if not given:  # the runtime's own architecture alone
            raise ProfileError("it names no architectures: 32-bit calls would be killed")
    for arch, lesser in rows.items():
        missing = [name for name in _LESSER[arch] if name not in lesser]
        if missing:
            raise ProfileError(f"calls of {', '.join(missing)} would be killed: add them beside {arch}")
