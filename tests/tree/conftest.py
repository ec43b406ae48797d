"""Real overlays on an ext4 image of the session's own, served by one server."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overt.host import mounts
from overt.server.client import Client, start

from .ground import Ground, Layers

_UNEXPECTED = ("internal error", "reply refused by the kernel", "refused")


@pytest.fixture(autouse=True)
def needs_root(request: pytest.FixtureRequest) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture(scope="session")
def ground() -> Iterator[Ground]:
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="overt-tree-", dir=memory) as name:
        directory = Path(name)
        directory.chmod(0o755)
        image, point = directory / "image", directory / "mnt"
        with open(image, "wb") as file:
            file.truncate(6 << 30)
        point.mkdir()
        subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=1", "-N", "200000", image], check=True, timeout=60)
        subprocess.run(["mount", "-o", "loop,discard", image, point], check=True, timeout=60)
        try:
            server = start(str(directory / "socket"), log=str(directory / "log"))
            try:
                with Client(server.path) as client:
                    yield Ground(point, client)
            finally:
                assert server.stop() == 0
        finally:
            mounts.umount(point, mounts.MNT_DETACH)


@pytest.fixture
def quiet(ground: Ground) -> Iterator[None]:
    """The server must not meet what no healthy server meets."""
    before = ground.client.status()["events"]
    yield
    after = ground.client.status()["events"]
    if any(after.get(kind, 0) != before.get(kind, 0) for kind in _UNEXPECTED):
        events = [event for event in ground.client.events() if event["event"] in _UNEXPECTED]
        pytest.fail(json.dumps(events[-3:], indent=1).replace("\\n", "\n"))


@pytest.fixture
def new_layers(ground: Ground, quiet: None) -> Iterator[Callable[..., Layers]]:
    """Make the layers of an overlay; they go at the end of the test."""
    made: list[Layers] = []

    def make(lowers: int = 1, options: str = "", features: str = "") -> Layers:
        made.append(Layers(ground, lowers=lowers, options=options, features=features))
        return made[-1]

    yield make
    for layers in made:
        layers.close()


@pytest.fixture
def layers(new_layers: Callable[..., Layers]) -> Layers:
    """One upper and one lower layer, not mounted yet."""
    return new_layers()


@pytest.fixture(params=["", "nopassthrough"], ids=["passthrough", "nopassthrough"])
def data_layers(request: pytest.FixtureRequest, new_layers: Callable[..., Layers]) -> Layers:
    """The same, for each way that data can flow."""
    return new_layers(options=str(request.param))
