"""From a seccomp profile as podman and docker read it to one as an OCI runtime does.

The first says what holds for which architecture, capability and kernel (`archMap`, `includes`, `excludes`), and the
engine picks for each container. Kubernetes' node profiles are of the second kind: they are read as they are.
"""

import os
from typing import Any

DEFAULT_CAPABILITIES = frozenset({
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
})  # fmt: skip
"""of a container that asks for no others, in docker and containerd"""
_MACHINES = {"x86_64": ("amd64", "SCMP_ARCH_X86_64"), "aarch64": ("arm64", "SCMP_ARCH_AARCH64")}
_OF_A_RULE = ("names", "action", "errnoRet", "args")


def resolve(
    profile: dict[str, Any], capabilities: frozenset[str] = DEFAULT_CAPABILITIES, machine: str = "", release: str = ""
) -> dict[str, Any]:
    """What holds of `profile` for containers with these capabilities; one of the second kind is returned as it is.

    `machine`, `release`: as in uname(2), by default this machine's. Raises ValueError for a machine that is not known.
    """
    if "archMap" not in profile:
        return profile
    machine, release = machine or os.uname().machine, release or os.uname().release
    if machine not in _MACHINES:
        raise ValueError(f"no architecture is known for {machine}: there are {', '.join(_MACHINES)}")
    name, architecture = _MACHINES[machine]
    lesser = {row["architecture"]: row.get("subArchitectures") or [] for row in profile["archMap"]}
    rules = [
        {key: rule[key] for key in _OF_A_RULE if rule.get(key) is not None}
        for rule in profile.get("syscalls") or [] if _holds(rule, name, capabilities, release)
    ]  # fmt: skip
    made = {"defaultAction": profile["defaultAction"], "architectures": [architecture, *lesser.get(architecture, [])]}
    if "defaultErrnoRet" in profile:
        made["defaultErrnoRet"] = profile["defaultErrnoRet"]
    return {**made, "syscalls": rules}


def _holds(rule: dict[str, Any], architecture: str, capabilities: frozenset[str], release: str) -> bool:
    """Whether a rule is for such a container."""
    only, never = rule.get("includes") or {}, rule.get("excludes") or {}
    return (
        (not only.get("arches") or architecture in only["arches"])
        and set(only.get("caps") or ()) <= capabilities
        and (not only.get("minKernel") or _numbers(only["minKernel"]) <= _numbers(release))
        and architecture not in (never.get("arches") or ())
        and not capabilities & set(never.get("caps") or ())
        and (not never.get("minKernel") or _numbers(never["minKernel"]) > _numbers(release))
    )


def _numbers(release: str) -> tuple[int, int]:
    """6.18.44-x -> (6, 18)."""
    major, minor = release.split(".")[:2]
    return int(major), int("".join(digit for digit in minor.partition("-")[0] if digit.isdigit()) or 0)
