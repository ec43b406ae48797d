"""podman of an ordinary user: overt as plain FUSE in a user namespace, with marks in user.overlay.*."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from overt.host import mounts

from .engine import Engine, rootless, why_not, why_not_rootless

pytestmark = [pytest.mark.root, pytest.mark.timeout(110)]


@pytest.fixture
def podman() -> Iterator[Engine]:
    problem = "needs root" if os.geteuid() != 0 else why_not() or why_not_rootless()
    if problem:
        pytest.skip(problem)
    base = Path(tempfile.mkdtemp(prefix="overt-rootless-"))
    fd = mounts.new_mount("tmpfs", [("mode", "755")])
    mounts.attach(fd, base)
    os.close(fd)
    try:
        with rootless(base / "e") as made:
            yield made
    finally:
        mounts.umount(base, mounts.MNT_DETACH)
        base.rmdir()


def test_a_container_from_run_to_rm(podman: Engine) -> None:
    say = "echo new >/etc/greeting; rm /bin/id; touch /x; chown 5:6 /x; stat -c %u:%g /x"
    assert podman.podman("run", "--name", "one", "tiny", "sh", "-c", say) == "5:6\n"
    assert {"A /x", "D /bin/id"} <= set(podman.podman("diff", "one").split("\n"))
    podman.podman("commit", "-q", "one", "changed")
    said = podman.podman("run", "--rm", "changed", "sh", "-c", "ls /bin/id; stat -c %u:%g /x; cat /etc/greeting")
    assert sorted(said.splitlines()) == ["5:6", "ls: /bin/id: No such file or directory", "new"]


def test_other_ids_in_the_container(podman: Engine) -> None:
    """--userns=keep-id makes podman ask for uidmapping= and gidmapping=."""
    keep = ("run", "--rm", "--userns=keep-id")
    assert podman.podman(*keep, "tiny", "sh", "-c", "touch /tmp/x; stat -c %u /tmp/x; stat -c %u:%g /etc") == (
        f"{os.stat(podman.base).st_uid}\n0:0\n"
    )


def test_a_running_container(podman: Engine) -> None:
    podman.podman("run", "-d", "--name", "one", "tiny", "sleep", "100")
    podman.podman("exec", "one", "sh", "-c", "echo hello >/file")
    assert podman.podman("exec", "one", "cat", "/file") == "hello\n"
    assert " fuse.overt " in podman.run("podman", "unshare", "grep", "overt", "/proc/self/mounts")
    podman.podman("restart", "--time", "0", "one")
    assert podman.podman("exec", "one", "cat", "/file") == "hello\n"
