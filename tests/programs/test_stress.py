"""stress-ng's filesystem stressors, each for itself and all at once.

Left out, because what they exercise is not a filesystem that is mounted here:
binderfs, bind-mount: they mount what they need themselves (and bind-mount fails on any filesystem in this namespace);
eventfd, ioprio, procfs: no file of the mount is used;
io: it calls syncfs(2) on every mount of the namespace, and takes errors from those that fail for other tests.
Not beside the others: fanotify. Events that nobody has read yet hold the removed files that they are about, on every
filesystem, and inotify's stressor then waits in vain to be told that they are gone.
sync(2), which mknod, dentry, open and others call, does nothing here (without_sync.py), and /proc/sys is read-only:
iomix drops the caches of the whole machine, and waits for each filesystem on it.
"""

import re

import pytest

from .ground import Overlay, run

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

EXCLUDED = {"binderfs", "bind-mount", "eventfd", "io", "ioprio", "procfs"}
APART = {"fanotify"}
# The ones that write much by default: a gigabyte each. And an open file takes a descriptor of the server's, too, which
# has the same limit (docs/limits.md): who opens as many leaves the others none.
BOUNDED = [
    "--open-max=8192",
    "--chdir-dirs=1024",
    *(f"--{name}-bytes=128m" for name in ("hdd", "fallocate", "iomix", "copy-file", "sync-file")),
]


def stressors() -> list[str]:
    """The class `filesystem` of the stress-ng that is installed, without EXCLUDED."""
    listing = run("stress-ng", "--class", "filesystem?", status=(0, 1))
    found = re.search(r"class 'filesystem' stressors: (.*)", listing)
    assert found, listing
    return [name for name in found[1].split() if name not in EXCLUDED]


READ_ONLY = ["unshare", "--mount", "sh", "-euc", 'mount --bind -o ro /proc/sys /proc/sys; exec "$@"', "sh"]


def stress(overlay: Overlay, names: list[str], seconds: int, patience: float) -> None:
    said = run(
        *READ_ONLY, "stress-ng", *(f"--{name}=1" for name in names), *BOUNDED, f"--timeout={seconds}",
        "--verify", "--oomable", f"--temp-path={overlay.path}", cwd=overlay.path, timeout=patience,
    )  # fmt: skip
    assert not re.search(r"\b(fail|error):", said), said
    run("find", overlay.path, "-mindepth", "1", "-delete")
    assert not list(overlay.upper.iterdir())


@pytest.mark.parametrize("seconds", [5, pytest.param(600, marks=[pytest.mark.long, pytest.mark.timeout(1500)])])
def test_all_stressors_at_once_find_no_error(overlay: Overlay, seconds: int) -> None:
    names = [name for name in stressors() if name not in APART]
    stress(overlay, names, seconds, 2 * seconds + 120)


@pytest.mark.long
def test_one_stressor_after_another_finds_no_error(overlay: Overlay) -> None:
    for name in stressors():
        stress(overlay, [name], 4, 60)
