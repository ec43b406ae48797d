"""A filesystem in memory for layers, and overt called as fuse-overlayfs is."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from overt.host import mounts

SOURCE = Path(__file__).resolve().parents[2] / "src"
MAIN = "import sys; sys.path.insert(0, sys.argv.pop(1)); from overt.cli.fuse_overlayfs import main; main()"


class Place:
    """Directories for one mount; `lower` has files of several owners."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.lower, self.upper, self.work, self.merged = (base / name for name in ("lower", "upper", "work", "merged"))
        for path in (self.lower, self.upper, self.work, self.merged, self.lower / "dir"):
            path.mkdir()
        for uid in (0, 1, 50):
            path = self.lower / f"of{uid}"
            path.write_text("lower\n")
            os.chown(path, uid, uid)

    @property
    def options(self) -> str:
        return f"lowerdir={self.lower},upperdir={self.upper},workdir={self.work}"

    def call(self, *words: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run fuse-overlayfs with `words`."""
        return subprocess.run(
            [sys.executable, "-c", MAIN, str(SOURCE), *map(str, words)],
            cwd=self.base, env={**os.environ, "OVERT_SERVER": "", **environment}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def mount(self, extra: str = "") -> Path:
        """Mount, with the three directories and `extra`."""
        done = self.call("-o", f"{self.options},{extra}", self.merged)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        return self.merged

    def umount(self) -> None:
        mounts.umount(self.merged)


@pytest.fixture
def place() -> Iterator[Place]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    base = Path(tempfile.mkdtemp(prefix="overt-dropin-"))  # not tmp_path: other users have to get there
    fd = mounts.new_mount("tmpfs", [("mode", "755")])
    mounts.attach(fd, base)
    os.close(fd)
    made = Place(base)
    try:
        yield made
    finally:
        while os.path.ismount(made.merged):
            made.umount()
        mounts.umount(base, mounts.MNT_DETACH)
        base.rmdir()
