"""The kubelet's side of containerd, as far as it takes to run a pod of one container, and a command in it.

It is the Container Runtime Interface, v1 (api.proto of kubernetes/cri-api); the pod is on the host's network. A message
is a list of (field number, value); a value is a number, text, or a message.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from .daemons import VOLUMES

Message = Sequence[tuple[int, Any]]
_NODE, _CONTAINER, _POD = 2, 1, 0
_NAMESPACES: Message = [(1, _NODE), (2, _CONTAINER), (3, _POD)]
RUNTIME_DEFAULT: Message = [(1, 0)]
_SECONDS = 60


def localhost(path: str) -> Message:
    """The SecurityProfile of a profile on the node."""
    return [(1, 2), (2, path)]


def encode(message: Message) -> bytes:
    """A message on the wire: varints, and what has a length."""
    out = bytearray()
    for number, value in message:
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        else:
            data = value.encode() if isinstance(value, str) else encode(value)
            out += _varint(number << 3 | 2) + _varint(len(data)) + data
    return bytes(out)


def decode(data: bytes) -> dict[int, Any]:
    """The fields of a message, those of a message in it as bytes; of a repeated one the last."""
    fields: dict[int, Any] = {}
    words = iter(data)
    for tag in iter(lambda: _number(words), None):
        value = _number(words) or 0
        fields[tag >> 3] = bytes(next(words) for _ in range(value)) if tag & 7 == 2 else value
    return fields


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(words: Iterator[int]) -> int | None:
    """A varint; None at the end."""
    value = shift = 0
    for byte in words:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value
    return None


class Runtime:
    """The RuntimeService that listens on a socket."""

    def __init__(self, socket: str) -> None:
        self._channel = grpc.insecure_channel(f"unix://{socket}")

    def call(self, name: str, *fields: tuple[int, Any]) -> dict[int, Any]:
        call = self._channel.unary_unary(f"/runtime.v1.RuntimeService/{name}")
        return decode(call(encode(fields), timeout=_SECONDS))

    def run_pod(self, name: str, handler: str, seccomp: Message | None, image: str) -> tuple[str, str]:
        """Start a pod of one container; their ids. `handler`: what a RuntimeClass says; `seccomp`: None, if unset."""
        sandbox: Message = [
            (1, [(1, name), (2, name), (3, "default")]), (3, "/tmp"), (8, [(2, [(1, _NAMESPACES)])]),
        ]  # fmt: skip
        pod = self.call("RunPodSandbox", (1, sandbox), (2, handler))[1].decode()
        security = [(3, _NAMESPACES), *([(15, seccomp)] if seccomp is not None else [])]
        mounts = [(7, [(1, path), (2, os.path.realpath(path)), (3, 1)]) for path in VOLUMES]
        container: Message = [
            (1, [(1, name)]), (2, [(1, image)]), (3, "/bin/sleep"), (3, "600"), *mounts, (15, [(2, security)]),
        ]  # fmt: skip
        made = self.call("CreateContainer", (1, pod), (2, container), (3, sandbox))[1].decode()
        self.call("StartContainer", (1, made))
        return pod, made

    def execute(self, container: str, *words: str) -> tuple[int, str]:
        """Run a command: its exit status, and what it said on standard error."""
        done = self.call("ExecSync", (1, container), *((2, word) for word in words), (3, _SECONDS))
        return done.get(3, 0), done.get(2, b"").decode()

    def remove(self, pod: str) -> None:
        """End a pod, and take it away."""
        self.call("StopPodSandbox", (1, pod))
        self.call("RemovePodSandbox", (1, pod))

    def close(self) -> None:
        self._channel.close()
