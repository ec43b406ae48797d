"""tar and rsync: owners, times, hard links, ACLs, xattrs, holes and devices go in and come out as they were."""

from pathlib import Path

import pytest

from .ground import Ground, run
from .tree import differences, manifest, plant

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

TAR = ["tar", "--xattrs", "--xattrs-include=*", "--acls", "--sparse", "--numeric-owner", "-p"]
RSYNC = ["rsync", "-aHAXS", "--numeric-ids", "--delete"]
FILES = 600


@pytest.fixture(scope="module")
def source(ext4: Path) -> Path:
    """A tree outside every overlay."""
    path = ext4 / "source"
    plant(path, FILES)
    return path


def test_a_tree_goes_in_and_out_by_tar(layers: Ground, data_path: str, source: Path) -> None:
    wanted = manifest(source)
    overlay = layers.overlay(options=data_path)
    inside, outside = overlay.path / "tree", layers.directory / "outside"
    for directory in (inside, outside):
        directory.mkdir()
    archive = layers.directory / "archive.tar"
    run(*TAR, "-cf", archive, "-C", source, ".")
    run(*TAR, "-xf", archive, "-C", inside)
    assert not differences(wanted, manifest(inside))
    assert (inside / "special/sparse").stat().st_blocks * 512 < 1 << 20
    run(*TAR, "-cf", archive, "-C", inside, ".")
    run(*TAR, "-xf", archive, "-C", outside)
    assert not differences(wanted, manifest(outside))
    assert run(*TAR, "--compare", "-f", archive, "-C", inside) == ""
    layers.umount(overlay)
    layers.remount(overlay)
    assert not differences(wanted, manifest(inside))
    run("rm", "-r", inside)
    assert not list(overlay.upper.iterdir())


def test_rsync_brings_a_merged_tree_up_to_date_and_copies_it_out(layers: Ground, data_path: str, source: Path) -> None:
    lower, outside = layers.directory / "lower", layers.directory / "outside"
    lower.mkdir()
    plant(lower / "tree", FILES // 2, seed=1)  # the same names, partly with the same content
    overlay = layers.overlay(lower, data_path)
    inside = overlay.path / "tree"
    below = manifest(lower)
    run(*RSYNC, f"{source}/", f"{inside}/", timeout=120)
    wanted = manifest(source)
    assert not differences(wanted, manifest(inside))
    assert run(*RSYNC, "--itemize-changes", "--checksum", f"{source}/", f"{inside}/", timeout=120) == ""
    layers.umount(overlay)
    layers.remount(overlay)
    run(*RSYNC, f"{inside}/", f"{outside}/", timeout=120)
    assert not differences(wanted, manifest(outside))
    assert not differences(below, manifest(lower)), "the lower layer was changed"
    run("rm", "-r", inside)
    assert list(overlay.path.iterdir()) == []
