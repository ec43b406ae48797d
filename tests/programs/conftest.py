"""Each test gets a new overlay on a filesystem of the session's own; the chroot of Debian packages is made once."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .debian import NoNetwork, bootstrap
from .ground import Ground, Overlay, ground, image


@pytest.fixture(autouse=True)
def needs_root(request: pytest.FixtureRequest) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture(scope="session")
def ext4() -> Iterator[Path]:
    with image("ext4", 8 << 30) as path:
        yield path


@pytest.fixture
def layers(ext4: Path, tmp_path: Path) -> Iterator[Ground]:
    directory = Path(tempfile.mkdtemp(dir=ext4))
    directory.chmod(0o755)
    with ground(directory, tmp_path / "server.log") as made:
        yield made


@pytest.fixture(params=["", "nopassthrough"], ids=["passthrough", "nopassthrough"])
def data_path(request: pytest.FixtureRequest) -> str:
    """The mount option for how data flows (MOSTLY_PASSTHROUGH: without passthrough in the long tests only)."""
    return str(request.param)


@pytest.fixture
def overlay(layers: Ground, data_path: str) -> Overlay:
    return layers.overlay(options=data_path)


@pytest.fixture(scope="session")
def debian(ext4: Path) -> Iterator[Path]:
    """The root directory of a minimal Debian system; to be a lower layer only."""
    root = ext4 / "debian"
    try:
        bootstrap(root)
    except NoNetwork as reason:
        pytest.skip(str(reason))
    yield root
    shutil.rmtree(root)
