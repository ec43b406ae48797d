"""Seccomp profiles in which syncfs(2) is the agent's to answer.

Two formats are in use. A profile as podman and docker read it (the containers' seccomp.json: `archMap`, `includes`) and
the `linux.seccomp` of an OCI config.json (`architectures`). Both have `syscalls`, rules of names, an action and, maybe,
conditions; a rule that names syncfs is taken apart and a rule of our own added.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

CALL = "syncfs"
NOTIFY = "SCMP_ACT_NOTIFY"
_ALLOW = "SCMP_ACT_ALLOW"
_HARMLESS = {_ALLOW, "SCMP_ACT_LOG", "SCMP_ACT_TRACE"}
_LESSER = {"SCMP_ARCH_X86_64": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"], "SCMP_ARCH_AARCH64": ["SCMP_ARCH_ARM"]}
_RELEASE = re.compile(r"[0-9]{1,9}\.[0-9]{1,9}")
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
    of a kind that it was not told of); one that notifies somebody of other calls, as a container has one listener only.
    """
    _refuse_nonsense(base, "the profile")
    if not socket.startswith("/"):
        raise ProfileError(f"the socket has to be an absolute path: {socket}")
    other = base.get("listenerPath")
    if other and other != socket:
        raise ProfileError(f"its calls are notified to another agent: {other}")
    if base.get("defaultAction") == NOTIFY:
        raise ProfileError(f"it notifies other calls: its defaultAction is {NOTIFY}")
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
    return _of(_parse(Path(path).read_bytes(), path), path)


def guarded(text: str, path: str, socket: str) -> dict[str, Any]:
    """An OCI config.json, `text` in the file `path`, with its profile made the agent's. ProfileError."""
    what = "a bundle's config.json"
    whole = _parse(text, path, what)
    if "ociVersion" not in whole:
        raise ProfileError(f"{path}: not {what}: no ociVersion")
    made = make(_of(whole, path), socket)
    return {**whole, "linux": {**whole["linux"], "seccomp": made}}


def _parse(text: str | bytes, path: str, what: str = "a seccomp profile") -> dict[str, Any]:
    try:
        whole = json.loads(text)
    except RecursionError:
        raise ProfileError(f"{path}: not {what}: nested too deeply") from None
    except ValueError as error:
        raise ProfileError(f"{path}: not {what}: {error}") from None
    if not isinstance(whole, dict):
        raise ProfileError(f"{path}: not {what}: not an object")
    return whole


def _of(whole: dict[str, Any], path: str) -> dict[str, Any]:
    """The profile that is, or is in, what a file holds."""
    where = path
    if "ociVersion" in whole:
        if not isinstance(whole.get("linux"), dict):
            raise ProfileError(f"{path}: not a seccomp profile: it has no `linux`, where one would be")
        whole = whole["linux"].get("seccomp")
        if whole is None:
            return dict(MINIMAL)
        where = f"{path}: linux.seccomp"
    if not isinstance(whole, dict) or not isinstance(whole.get("defaultAction"), str):
        raise ProfileError(f"{where}: not a seccomp profile: no defaultAction")
    _refuse_nonsense(whole, where)
    return dict(whole)


def _names(rule: dict[str, Any]) -> list[str]:
    return list(rule.get("names") or ([rule["name"]] if rule.get("name") else []))


def _refuse_nonsense(base: dict[str, Any], where: str) -> None:
    """What the runtime would refuse as well, but in words that name the file and the member."""
    for member in ("syscalls", "archMap"):
        rows = base.get(member) or []
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ProfileError(f"{where}: {member} is not a list of objects")
    for row in base.get("archMap") or []:
        if not isinstance(row.get("architecture"), str):
            raise ProfileError(f"{where}: archMap has a row without an architecture")
    for member in ("includes", "excludes"):
        if not all(isinstance(rule.get(member), dict | None) for rule in base.get("syscalls") or []):
            raise ProfileError(f"{where}: a rule's {member} is not an object")
    conditions = [rule.get(member) or {} for rule in base.get("syscalls") or [] for member in ("includes", "excludes")]
    releases = [each["minKernel"] for each in conditions if each.get("minKernel")]
    if not all(isinstance(release, str) and _RELEASE.match(release) for release in releases):
        raise ProfileError(f"{where}: a rule's minKernel is not the number of a kernel")
    lists = [("architectures", base.get("architectures"))]
    lists += [("subArchitectures", row.get("subArchitectures")) for row in base.get("archMap") or []]
    lists += [("names", rule.get("names")) for rule in base.get("syscalls") or []]
    lists += [(member, each.get(member)) for each in conditions for member in ("arches", "caps")]
    for member, names in lists:
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ProfileError(f"{where}: {member} is not a list of names")
    if not all(isinstance(rule.get("name"), str | None) for rule in base.get("syscalls") or []):
        raise ProfileError(f"{where}: a rule's name is not a name")
    if not isinstance(base.get("listenerPath"), str | None):
        raise ProfileError(f"{where}: listenerPath is not a path")


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
