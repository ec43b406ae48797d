"""A container's listener, and what came with it: the container process state of the OCI runtime specification.

A process that joins a container (`podman exec`, `crun exec`) brings a listener of its own with the container's id.
What is in the state is the runtime's word, which the socket's mode and the peer's credentials vouch for. No more is
taken from it than names, and the number of a process to look at.
"""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from overt.guard.line import Line

_IMAGES = ("io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName", "org.opencontainers.image.ref.name")
_MOST = 16 << 20
"""bytes of an engine's file"""
_MOST_LOOKUPS = 2
_SECCOMP_FD = "seccompFd"
_UNKNOWN = "(unknown)"
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
    annotations: Any = None
    unread: str = ""
    """why nothing else of it is known: calls are answered with EIO then"""


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
            annotations=state.get("annotations"),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"no container process state: {type(error).__name__}: {error}") from None


def read(data: bytes, fds: Sequence[int]) -> State:
    """The state that came with these descriptors, one of which is the listener. Raises ValueError where none is.

    A listener that comes with a state that cannot be read is kept all the same: were it closed, the container would run
    on without.
    """
    try:
        state = parse(data)
        if state.listener >= len(fds) or not is_listener(fds[state.listener]):
            raise ValueError("the descriptor that came with it is no seccomp listener")
    except ValueError as error:
        for at, fd in enumerate(fds):
            if is_listener(fd):
                return State(_UNKNOWN, 0, "", "", at, unread=str(error))
        raise
    return state


def shorten(data: bytes) -> bytes:
    """A container process state with no more in it than is used: engines put anything into annotations.

    What is no such state is returned as it is.
    """
    try:
        whole: Any = json.loads(data)
        given = whole["state"]
        state = {key: given[key] for key in ("id", "pid", "bundle") if key in given}
        if isinstance(given.get("annotations"), dict):
            state["annotations"] = {key: given["annotations"][key] for key in _IMAGES if key in given["annotations"]}
        kept = {key: whole[key] for key in ("fds", "pid", "metadata") if key in whole}
        return json.dumps({**kept, "state": state}).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return data


def image(state: State) -> str:
    """The image of a container: an annotation of the engine's (its own, or in the bundle), or podman's records.

    A name, for the events: empty where nobody says it. It reads files, which may be on a disk that hangs.
    """
    for known in (state.annotations, _read(f"{state.bundle}/config.json", "annotations")):
        if isinstance(known, dict):
            for key in _IMAGES:
                if isinstance(known.get(key), str):
                    return str(known[key])
    records = _read(f"{state.bundle}/../../containers.json")  # of podman's storage (containers/storage)
    for record in records if isinstance(records, list) else []:
        if isinstance(record, dict) and record.get("id") == state.id:
            try:
                return str(json.loads(record["metadata"])["image-name"])
            except (ValueError, KeyError, TypeError):
                return str(record.get("image", ""))
    return ""


def _read(path: str, key: str | None = None) -> object:
    """A JSON file's content, or a member of it; None if there is none."""
    try:
        with open(path, "rb") as file:
            whole = json.loads(file.read(_MOST))
        return whole if key is None else whole.get(key)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def is_listener(fd: int) -> bool:
    """Whether a descriptor is what seccomp(2) returns for SECCOMP_FILTER_FLAG_NEW_LISTENER."""
    return os.readlink(f"/proc/self/fd/{fd}") == _NOTIFY


class Container:
    """One listener at work."""

    def __init__(self, number: int, state: State, fd: int) -> None:
        self.number = number
        self.state = state
        self.fd = fd
        self.image = ""
        """as far as the engine says it, and as soon as it was looked for"""
        self.devices: set[int] = set()
        """superblocks of the overlays that it was seen to use"""
        self.calls = 0
        self.waiting = 0
        """calls that are being answered"""
        self.opening = 0
        """overlays that are being opened for it"""
        self.lookups = Line(_MOST_LOOKUPS)
        """of mounts that calls are about: each takes the longer the more mounts it has"""
        self.receiving = False
        """a thread is taking the next call"""
        self.paused = False
        self.closed = False
