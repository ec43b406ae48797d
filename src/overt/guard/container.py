"""A container's listener, and what came with it: the container process state of the OCI runtime specification.

A process that joins a container (`podman exec`, `crun exec`) brings a listener of its own with the container's id.
What is in the state is the runtime's word, which the socket's mode and the peer's credentials vouch for. No more is
taken from it than names, and the number of a process to look at.
"""

import json
import os
from typing import Any, NamedTuple

_SECCOMP_FD = "seccompFd"
_NOTIFY = "anon_inode:seccomp notify"


class State(NamedTuple):
    """The part of the state that is used."""

    id: str
    pid: int
    """0: the runtime has not said it (crun, of a process that joins)"""
    bundle: str
    metadata: str
    listener: int
    """which of the descriptors it is"""


def parse(data: bytes) -> State:
    """Read a container process state (config-linux.md, "containerProcessState"). Raises ValueError."""
    try:
        whole: Any = json.loads(data)
        state = whole["state"]
        return State(
            id=str(state["id"]),
            pid=int(whole.get("pid") or state.get("pid") or 0),
            bundle=str(state.get("bundle", "")),
            metadata=str(whole.get("metadata", "")),
            listener=list(whole["fds"]).index(_SECCOMP_FD),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no container process state: {type(error).__name__}: {error}") from None


def is_listener(fd: int) -> bool:
    """Whether a descriptor is what seccomp(2) returns for SECCOMP_FILTER_FLAG_NEW_LISTENER."""
    return os.readlink(f"/proc/self/fd/{fd}") == _NOTIFY


class Container:
    """One listener at work."""

    def __init__(self, number: int, state: State, fd: int) -> None:
        self.number = number
        self.state = state
        self.fd = fd
        self.devices: set[int] = set()
        """superblocks of the overlays that it was seen to use"""
        self.calls = 0
        self.waiting = 0
        """calls that are being answered"""
        self.receiving = False
        """a thread is taking the next call"""
        self.paused = False
        self.closed = False
