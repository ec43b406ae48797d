"""Probes stand on directories that somebody else may write to: a container's, on a volume of its own."""

import os
from pathlib import Path

import pytest

from overt.host import mounts
from overt.upper import probes

from .stage import Stage

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

PARTS = ("upper", "work")
DIRTY = "work/work/incompat/volatile/dirty"


class Meddler:
    """Puts symbolic links to a directory of the host's in the place of a probe's parts, at a moment it is told."""

    def __init__(self, root: Path) -> None:
        self.host, self.volume = root / "host", root / "volume"
        self.volume.mkdir()
        for file in ("upper/precious", "work/work/precious", DIRTY):
            (self.host / file).parent.mkdir(parents=True, exist_ok=True)
            (self.host / file).write_text("the host's")

    def swap(self) -> None:
        (probe,) = self.volume.glob("probe-*")
        for part in PARTS:
            (probe / part).rename(self.volume / f"its own {part}")
            (probe / part).symlink_to(self.host / part)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.host)) for path in self.host.rglob("*") if path.is_file()}


@pytest.mark.parametrize("volatile", [True, False], ids=["volatile", "ordinary"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_container_puts_in_place_of_a_probes_directories_is_left_alone(
    ext4: Stage, monkeypatch: pytest.MonkeyPatch, when: str, volatile: bool
) -> None:
    """The kernel empties the directory that it is given to work in, and we remove what it has made."""
    meddler = Meddler(ext4.root)
    before = meddler.files()
    assert len(before) == 3
    real = mounts.new_mount

    def new_mount(kind: str, options: list[tuple[str, str | int | None]]) -> int:
        if when == "before":
            meddler.swap()
        fd = real(kind, options)
        if when == "after":
            meddler.swap()
        return fd

    monkeypatch.setattr(probes.mounts, "new_mount", new_mount)
    scratch = os.open(meddler.volume, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.close(probes.mount(scratch, volatile=volatile))
    finally:
        os.close(scratch)
    assert meddler.files() == before
    assert not list(meddler.volume.glob("probe-*"))
