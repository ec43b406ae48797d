"""Many processes at the same tree: nobody knows what it will look like, but overt and the kernel must agree on it."""

import os
import random
import time
from typing import Any

import pytest

from overt.host.files import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate, renameat2

from .ground import Layers, describe

_NAMES = "abcdefgh"


def torture(root: str, seed: int, seconds: float) -> None:
    """Do whatever comes to mind; errors are nothing special where others do the same."""
    chance = random.Random(seed)
    deadline = time.monotonic() + seconds

    def path() -> str:
        return "/".join([root, *chance.choices(_NAMES, k=chance.choice((1, 2, 2, 3)))])

    def write() -> None:
        fd = os.open(path(), os.O_RDWR | chance.choice((0, os.O_CREAT, os.O_TRUNC, os.O_APPEND)), 0o666)
        try:
            os.pwrite(fd, os.urandom(chance.choice((1, 5000))), chance.choice((0, 3000)))
            if chance.random() < 0.3:
                fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096)
            if chance.random() < 0.3:
                os.unlink(path())
            os.fstat(fd)
            os.pread(fd, 100, 0)
        finally:
            os.close(fd)

    def read() -> None:
        with open(path(), "rb") as file:
            file.read()

    calls: list[Any] = [
        write, write, read, read,
        lambda: os.mkdir(path()), lambda: os.mkdir(path()), lambda: os.rmdir(path()), lambda: os.unlink(path()),
        lambda: os.rename(path(), path()), lambda: os.rename(path(), path()),
        lambda: renameat2(-100, path().encode(), -100, path().encode(), chance.choice((1, 2))),
        lambda: os.link(path(), path()), lambda: os.symlink("x", path()), lambda: os.listdir(path()),
        lambda: os.chmod(path(), chance.choice((0o600, 0o755))),
        lambda: os.truncate(path(), chance.choice((0, 10, 9000))),
        lambda: os.setxattr(path(), "user.x", b"1"), lambda: os.listdir(root), lambda: os.lstat(path()),
    ]  # fmt: skip
    while time.monotonic() < deadline:
        try:
            chance.choice(calls)()
        except OSError:
            continue


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", [3.0, pytest.param(60.0, marks=pytest.mark.long)])
def test_processes_at_the_same_tree(data_layers: Layers, seconds: float) -> None:
    chance = random.Random(1)
    for layer in (data_layers.upper, data_layers.lower):
        for name in _NAMES:
            (layer / name).mkdir()
            for child in chance.sample(_NAMES, 5):
                if chance.random() < 0.5:
                    (layer / name / child).write_bytes(os.urandom(6000))
                else:
                    (layer / name / child).mkdir()
    root = str(data_layers.mount())
    children = []
    for seed in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                torture(root, seed, seconds)
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    expected = describe(data_layers.path)
    with data_layers.kernel() as path:
        assert describe(path) == expected
    for _ in range(2):
        assert describe(data_layers.mount()) == expected
        data_layers.umount()
