"""A lower layer that is a network filesystem, and says when a file is closed that something went wrong."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from .layer_server import BODY, NAMES, layer
from .scene import Overlay, Scene, wait_until

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

Stage = Callable[..., Scene]


def descriptors(scene: Scene) -> int:
    return len(os.listdir(f"/proc/{scene.server.pid}/fd"))


def held(scene: Scene) -> list[str]:
    """Files of the layer that the server has open."""
    found = []
    for link in Path(f"/proc/{scene.server.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed while we look
            found.append(os.readlink(link))
    return [name for name in found if name.startswith("/file")]


@pytest.fixture
def far(ext4: Scene) -> Iterator[tuple[Scene, Path]]:
    """A scene whose lower layer is such a one, and the file to be made for its closes to fail."""
    with layer(ext4.base) as failing:
        ext4.lower = ext4.base / "far"
        yield ext4, failing
        for overlay in list(ext4.overlays):
            overlay.umount()


def read_all(overlay: Overlay) -> None:
    for name in NAMES:
        assert (overlay.target / os.fsdecode(name)).read_bytes() == BODY


@pytest.mark.parametrize("data", ["", "nopassthrough"])
def test_a_close_that_fails_is_an_event_and_nothing_stays_open(far: tuple[Scene, Path], data: str) -> None:
    """The reader was told all that it asked for; that its file could not be closed well is for the log."""
    scene, failing = far
    overlay = scene.overlay(data)
    read_all(overlay)
    wait_until(lambda: not held(scene), "what was read is closed")
    assert not (overlay.target / "asked after").exists()  # answered by the thread that closes: the last close is over
    before = descriptors(scene)
    failing.touch()
    read_all(overlay)
    wait_until(lambda: not held(scene), "what was read is closed")
    wait_until(lambda: descriptors(scene) <= before, "no descriptor is left")
    wait_until(lambda: len(scene.events("close failed")) >= len(NAMES), "all of it is said")
    said = scene.events("close failed")
    assert {event["mount"] for event in said} == {str(overlay.target)}
    assert len(said) == len(NAMES)
    assert all("Input/output error" in event["why"] for event in said)


def test_files_that_are_open_when_the_mount_ends_are_closed_all_of_them(far: tuple[Scene, Path]) -> None:
    scene, failing = far
    before = descriptors(scene)
    overlay = scene.overlay()
    container = scene.container()
    for name in NAMES:
        assert container.open(overlay.target / os.fsdecode(name)) > 0
    failing.touch()
    container.close()
    scene.containers.remove(container)
    overlay.umount()
    wait_until(lambda: descriptors(scene) <= before, "no descriptor is left")


@pytest.mark.parametrize("options", ["", "metacopy=on", "fsync=volatile"])
def test_a_copy_up_succeeds_though_the_lower_file_cannot_be_closed(far: tuple[Scene, Path], options: str) -> None:
    """All of it was read, as its size says. The kernel, which lets go of such a file without asking, goes on, too."""
    scene, failing = far
    overlay = scene.overlay(options)
    read_all(overlay)
    failing.touch()
    os.chmod(overlay.target / "file0", 0o600)
    before = descriptors(scene)
    for name in NAMES:
        with open(overlay.target / os.fsdecode(name), "ab") as file:
            file.write(b"more")
        assert (overlay.target / os.fsdecode(name)).read_bytes() == BODY + b"more"
        assert (overlay.upper / os.fsdecode(name)).read_bytes() == BODY + b"more"
    wait_until(lambda: descriptors(scene) <= before + 2, "no descriptor is left")
