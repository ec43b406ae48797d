"""The scenario of the demo with real containers: many `podman run`, one server, one lost write, each container asks."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from overt.lab import Disk

from .engine import Engine, engine, why_not
from .test_podman import _SYNC

pytestmark = pytest.mark.root

MIB = 1 << 20


@pytest.fixture
def podman() -> Iterator[tuple[Engine, Disk]]:
    problem = "needs root" if os.geteuid() != 0 else why_not()
    if problem:
        pytest.skip(problem)
    with Disk("ext4", size=512 << 20) as disk, engine(Path(disk.path, "e"), shared=True) as made:
        yield made, disk


def tools() -> list[str]:
    """Volumes with the machine's own sync(1): busybox's throws the answer away."""
    return [word for path in ("/usr", "/lib", "/lib64") if os.path.exists(path) for word in ("-v", f"{path}:{path}:ro")]


def proportional(made: Engine) -> int:
    """The memory of all of overt's processes that serve these mounts, shared pages shared out, in bytes."""
    place, total = os.readlink(f"/proc/{made.holder}/ns/mnt"), 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if os.readlink(f"/proc/{pid}/ns/mnt") == place and any(word.endswith(b"/bin/overt") for word in words[:2]):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
        except OSError:
            continue
    return total


@pytest.mark.parametrize(
    "many",
    [
        pytest.param(5, marks=pytest.mark.timeout(110)),
        pytest.param(50, marks=[pytest.mark.timeout(600), pytest.mark.long]),
    ],
)
def test_each_of_many_containers_is_told_once_of_one_lost_write(podman: tuple[Engine, Disk], many: int) -> None:
    made, disk = podman
    names = [f"container{number}" for number in range(many)]
    for name in names:
        made.podman("run", "-d", "--name", name, *tools(), "tiny", "sleep", "1000")
    assert len(made.mounts()) == many
    made.podman("exec", names[0], *_SYNC)
    disk.fail("data")
    made.podman("exec", "-i", names[0], "sh", "-c", "cat >/lost", given=disk.marker * 4096)
    disk.push()
    disk.heal()
    told = [made.podman("exec", name, *_SYNC, status=(0, 1)) for name in names]
    assert ["Input/output error" in said for said in told] == [True] * many
    assert [made.podman("exec", name, *_SYNC) for name in names] == [""] * many
    assert proportional(made)
    print(f"{many} containers: {proportional(made) / MIB:.0f} MiB")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_hundred_containers_on_one_server_take_little_memory(podman: tuple[Engine, Disk]) -> None:
    made, _ = podman
    for number in range(200):
        made.podman("run", "-d", "--name", f"container{number}", "tiny", "sleep", "1000")
    for number in range(0, 200, 10):
        made.podman("exec", f"container{number}", "sh", "-c", "echo x >/file; ls -lR /bin /etc >/dev/null")
    assert len(made.mounts()) == 200
    taken = proportional(made)
    print(f"200 containers: {taken / MIB:.0f} MiB")
    assert taken <= 100 * MIB
