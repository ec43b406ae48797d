"""The power goes away, at many moments of a recording: is what a flush has promised there, when the disk is mounted?

A *promise* is what was written before a call of the fsync family returned 0. It holds at every later moment. At each
moment that is tried the contents of the disk are put together (overt.lab.recording: all that was acknowledged, none of
what came after the last flush, or some of it, in turn), the filesystem is mounted, which replays its journal, and the
files are read in the upper layer. Every promise's own moment is tried, when nothing has come after it.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from overt.host import loop, mounts
from overt.judge.party import BLOCK, filled
from overt.judge.uppers import UPPERS
from overt.lab.filesystems import FILESYSTEMS
from overt.lab.recording import LEFT, Recording, Request


class Promise(NamedTuple):
    moment: int
    """of the recording, when the call had returned"""
    below: str
    """the directory, on the disk, that the paths are relative to"""
    files: dict[str, str]
    """what each file is filled with"""


def replay(recording: Recording, promises: Sequence[Promise], points: int, upper: str) -> tuple[int, list[str]]:
    """Try at least `points` moments; how many were tried, and what was not as promised at which."""
    requests = recording.requests()
    moments = choose(requests, promises, points)
    ways = LEFT if len(moments) < points else LEFT[:1]  # few moments: each in all three ways
    lost = []
    tries = [(number, moment, way) for number, moment in enumerate(moments) for way in ways]
    for number, moment, way in tries:
        left = way if len(ways) > 1 else LEFT[number % len(LEFT)]
        image = recording.contents(requests, moment, left, seed=number)
        try:
            what = missing(image, upper, due(requests, promises, moment))
        finally:
            os.close(image)
        if what:
            lost.append(f"{what}, after {moment} of {len(requests)} requests, {left} of the unflushed kept")
    return len(tries), lost


def choose(requests: Sequence[Request], promises: Sequence[Promise], points: int) -> list[int]:
    """The moments to try, as numbers of requests done: those of all promises, and others evenly between them."""
    if not promises:
        return []
    ends = [request.end for request in requests]
    own = {sum(end <= promise.moment for end in ends) for promise in promises}
    between = range(min(own), len(requests) + 1)
    every = max(1, len(between) // max(1, points))
    return sorted(own | set(between[::every]))


def due(requests: Sequence[Request], promises: Sequence[Promise], moment: int) -> list[Promise]:
    """The promises that had been made at a moment."""
    at = requests[moment - 1].end if moment else 0
    return [promise for promise in promises if promise.moment <= at]


def missing(image: int, upper: str, promises: Sequence[Promise]) -> str:
    """What is not as promised in a filesystem image (a file), in words; nothing if all is well."""
    row = FILESYSTEMS[UPPERS[upper].filesystem]
    words = [word for word in f"{row.mount_options},{UPPERS[upper].mount_options}".split(",") if word]
    options = [(word.partition("=")[0], word.partition("=")[2] or None) for word in words]
    device = loop.attach(image, name="overt-judge")
    try:
        try:
            root = mounts.new_mount(row.kind, [("source", device.path), *options])
        except OSError as error:
            return f"cannot be mounted: {error.strerror}"
    finally:
        os.close(device.fd)
    try:
        for promise in promises:
            for path, text in promise.files.items():
                try:
                    found = _read(root, f"{promise.below}/{path}")
                    if found is None:  # somebody may have changed it in place, in the lower layer
                        found = _read(root, f"lower/{path}")
                except OSError as error:
                    return f"{path}: cannot be read: {error.strerror}"
                if found != filled(text):
                    return f"{path}: {'absent' if found is None else 'other content'}"
    finally:
        os.close(root)
    return ""


def _read(root: int, path: str) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=root)
    except FileNotFoundError:
        return None
    try:
        return os.pread(fd, BLOCK, 0)
    finally:
        os.close(fd)
