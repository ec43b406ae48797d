"""What a server keeps of mounts that come to nothing."""

import gc
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from overt.events import Events
from overt.lab import Disk
from overt.overlay import options
from overt.server.layers import Refusal
from overt.server.service import Service

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]


@pytest.fixture
def service() -> Service:
    nobody: Any = None  # no mount gets so far that it is guarded
    return Service(Events(foreground=True), nobody, 100)


def refused(service: Service, root: Path, extra: str) -> str:
    for name in ("lower", "upper", "work", "merged"):
        (root / name).mkdir()
    text = f"lowerdir={root}/lower,upperdir={root}/upper,workdir={root}/work,{extra}"
    with pytest.raises(Refusal) as refusal:
        service.mount(options.parse(text), str(root / "merged"))
    return str(refusal.value)


def test_of_an_upper_whose_mount_was_refused_nothing_is_kept(service: Service) -> None:
    """The next filesystem with its device number would be taken for it, and for one that has proven itself."""
    with ExitStack() as stack:
        disk = stack.enter_context(Disk("ext4"))
        root = Path(disk.path)
        fd = os.open(root / "file", os.O_CREAT | os.O_WRONLY)
        os.write(fd, disk.marker)
        os.close(fd)
        disk.fail("data")
        disk.push()
        disk.heal()
        stack.callback(service.uppers.close)
        assert "nobody has been told of" in refused(service, root, "unseen=refuse")
        gc.collect()
        assert (service.uppers.known, list(service._proven)) == ({}, [])
