"""git: many small files, renames over files, hard links, mappings of packs, and stat data that has to stay."""

import random
from pathlib import Path

import pytest

from .ground import MOSTLY_PASSTHROUGH, Ground, Overlay, run

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

WHO = {
    "GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@example.org", "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.org", "GIT_CONFIG_NOSYSTEM": "1", "HOME": "/nonexistent",
}  # fmt: skip


def git(directory: Path, *words: str) -> str:
    return run("git", "-c", "safe.directory=*", *words, cwd=directory, env=WHO, timeout=120)


def history(commits: int, files: int) -> bytes:
    """A repository for git fast-import: `files` files, some of which change in each commit."""
    choose = random.Random(20)
    stream = []
    for commit in range(commits):
        changed = range(files) if commit == 0 else choose.sample(range(files), files // 20)
        stream.append(f"commit refs/heads/main\ncommitter A <a@example.org> {commit} +0000\ndata 3\nc {commit % 10}\n")
        for number in changed:
            text = "".join(f"{choose.random()}\n" for _ in range(choose.randrange(200)))
            stream.append(f"M 100644 inline d{number % 40}/e{number % 7}/f{number}\ndata {len(text)}\n{text}\n")
    return "".join(stream).encode()


@pytest.fixture(scope="module")
def origin(ext4: Path) -> Path:
    """A bare repository outside every overlay."""
    path = ext4 / "origin.git"
    run("git", "init", "-q", "--bare", "-b", "main", path, env=WHO)
    run("git", "fast-import", "--quiet", cwd=path, env=WHO, given=history(commits=40, files=1000), timeout=120)
    return path


def clean(work: Path) -> bool:
    return git(work, "status", "--porcelain") == ""


@MOSTLY_PASSTHROUGH
def test_a_clone_is_changed_committed_collected_and_whole(overlay: Overlay, origin: Path) -> None:
    work = overlay.path / "work"
    git(overlay.path, "clone", "-q", f"file://{origin}", "work")
    assert clean(work)
    git(work, "fsck", "--full", "--strict")
    git(work, "mv", "d1", "moved")
    (work / "moved/new").write_text("new\n")
    git(work, "rm", "-q", "-r", "d2")
    git(work, "add", "-A")
    git(work, "commit", "-q", "-m", "change")
    assert clean(work)
    git(work, "checkout", "-q", "HEAD~20")
    git(work, "checkout", "-q", "main")
    git(work, "worktree", "add", "-q", "../second", "HEAD~5")
    git(work, "repack", "-q", "-a", "-d", "-f")
    git(work, "gc", "-q", "--prune=now")
    git(work, "fsck", "--full", "--strict")
    assert clean(work) and clean(overlay.path / "second")
    git(overlay.path, "clone", "-q", "work", "linked")  # objects by hard links
    pack = next((overlay.path / "linked/.git/objects/pack").glob("*.pack"))
    assert pack.stat().st_nlink == 2
    git(overlay.path / "linked", "fsck", "--full")
    run("rm", "-r", overlay.path / "work", overlay.path / "second")
    git(overlay.path / "linked", "fsck", "--full")
    assert pack.stat().st_nlink == 1


def test_a_checkout_in_a_lower_layer_is_clean_and_goes_on_in_the_upper(
    layers: Ground, ext4: Path, origin: Path, data_path: str
) -> None:
    lower = layers.directory / "checkout"
    lower.mkdir()
    git(lower, "clone", "-q", f"file://{origin}", "work")
    overlay = layers.overlay(lower, data_path)
    work = overlay.path / "work"
    assert clean(work)
    for number, file in enumerate(sorted(work.glob("d3/*/*"))):
        file.write_text("changed\n") if number % 2 else file.unlink()
    git(work, "stash", "-q")
    assert clean(work)
    git(work, "stash", "pop", "-q")
    git(work, "commit", "-q", "-a", "-m", "change")
    git(work, "gc", "-q", "--prune=now")
    git(work, "fsck", "--full", "--strict")
    assert clean(work)
    layers.umount(overlay)
    layers.remount(overlay)
    git(work, "fsck", "--full", "--strict")
    assert clean(work)
    git(lower / "work", "fsck", "--full", "--strict")
    assert clean(lower / "work"), "the lower layer was changed"
