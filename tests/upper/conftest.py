from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from overt.lab import FILESYSTEMS
from overt.upper import probes

from .stage import Stage


@pytest.fixture(params=list(FILESYSTEMS))
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(request.param, stack)


@pytest.fixture
def ext4() -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage("ext4", stack)


@pytest.fixture
def btrfs() -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage("btrfs", stack)


@pytest.fixture
def no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where kernel overlayfs does not accept the upper."""

    def refuse(scratch_fd: int, *, volatile: bool) -> int:
        raise OSError(22, "kernel overlayfs is switched off for this test")

    monkeypatch.setattr(probes, "mount", refuse)
