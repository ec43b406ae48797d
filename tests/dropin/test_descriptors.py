"""Callers that have closed standard input, output and error: the mount works, and so does whoever asks about it."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from overt.server import registry, watchdog

from .conftest import SOURCE, Place

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

CLOSED = ("<&-", ">&-", "<&- >&- 2>&-")
PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from overt.cli.{} import main; main()"


@pytest.fixture
def watched(place: Place) -> Iterator[Place]:
    """Whatever happens, nobody waits for this mount for ever."""
    try:
        yield place
    finally:
        for device in registry.devices_at(str(place.merged)):
            watchdog.abort(device)


def run(place: Place, closed: str, *words: str) -> int:
    """The exit status of a command that is started with descriptors closed."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *words], cwd=place.base, timeout=20,
        env={**os.environ, "OVERT_SERVER": "", "PYTHONPATH": str(SOURCE)},
    ).returncode  # fmt: skip


def overt(module: str, *words: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(module), str(SOURCE), *words]


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("module", ["main", "helper", "fuse_overlayfs"])
def test_a_mount_lives_and_can_be_asked_about(watched: Place, module: str, closed: str) -> None:
    place = watched
    words = {
        "main": ["mount", "-o", place.options, "merged"],
        "helper": ["overt", "merged", "-o", place.options],
        "fuse_overlayfs": ["-o", place.options, "merged"],
    }[module]
    assert run(place, closed, *overt(module, *words)) == 0
    subprocess.run(["ls", place.merged], check=True, timeout=10, stdout=subprocess.DEVNULL)
    assert run(place, ">/dev/null", *overt("main", "status", "--json")) == 0
    if module == "helper":
        assert run(place, closed, *overt("umount_helper", str(place.merged))) == 0
    else:
        assert run(place, closed, *overt("main", "umount", str(place.merged))) == 0
    assert not os.path.ismount(place.merged)
