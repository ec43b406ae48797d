"""podman and buildah on overt: what people do with containers, and who is told when the disk loses their data."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from overt.lab import Disk

from .engine import Engine, engine, why_not

pytestmark = [pytest.mark.root, pytest.mark.timeout(110)]

_SYNC = ("/usr/bin/sync", "-f", "/bin")


@pytest.fixture(params=["own", "shared"])
def podman(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Disk]]:
    """An engine on a disk that can fail; a server for each mount, or one for all."""
    problem = "needs root" if os.geteuid() != 0 else why_not()
    if problem:
        pytest.skip(problem)
    with Disk("ext4") as disk, engine(Path(disk.path, "e"), shared=request.param == "shared") as made:
        yield made, disk


def servers(made: Engine) -> int:
    """How many overt servers run for the mounts of this engine (each with a watchdog, its child)."""
    place = os.readlink(f"/proc/{made.holder}/ns/mnt")
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/ns/mnt") == place:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if any(word.endswith((b"/bin/fuse-overlayfs", b"/bin/overt")) for word in words[:2]):
                    found[pid] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
    return sum(parent not in found for parent in found.values())


def test_a_container_from_run_to_rm(podman: tuple[Engine, Disk]) -> None:
    made, _ = podman
    say = "cat /etc/greeting; echo new >/etc/greeting; rm /bin/id; touch /x; chown 5:6 /x; stat -c %u:%g /x"
    made.podman("run", "--name", "first", "tiny", "sh", "-c", "echo hello >/etc/greeting")
    made.podman("commit", "-q", "first", "greeting")
    assert made.podman("run", "--name", "one", "greeting", "sh", "-c", say) == "hello\n5:6\n"
    assert sorted(made.podman("diff", "one").split("\n")) == [
        "",
        "A /x",
        "C /bin",
        "C /etc",
        "C /etc/greeting",
        "D /bin/id",
    ]
    made.podman("commit", "-q", "one", "changed")
    look = "cat /etc/greeting; ls /bin/id || stat -c %u:%g /x"
    said = made.podman("run", "--rm", "changed", "sh", "-c", look)
    assert sorted(said.splitlines()) == ["5:6", "ls: /bin/id: No such file or directory", "new"]
    made.podman("start", "--attach", "one", status=(0, 1))
    made.podman("rm", "first", "one")
    assert made.podman("ps", "--all", "--quiet") == ""


def test_a_running_container(podman: tuple[Engine, Disk]) -> None:
    made, _ = podman
    for name in ("one", "two", "three"):
        made.podman("run", "-d", "--name", name, "tiny", "sleep", "100")
    assert len(made.mounts()) == 3
    assert servers(made) == (1 if "OVERT_SERVER" not in made.environment else 3)
    made.podman("exec", "one", "sh", "-c", "echo of one >/file")
    made.podman("exec", "two", "ls", "/file", status=(1,))
    made.podman("cp", "one:/file", "two:/copy")
    assert made.podman("exec", "--user", "7", "two", "cat", "/copy") == "of one\n"
    made.podman("restart", "--time", "0", "one")
    assert made.podman("exec", "one", "cat", "/file") == "of one\n"
    made.podman("rm", "--force", "--time", "0", "one")
    assert len(made.mounts()) == 2


def test_read_only_and_volatile(podman: tuple[Engine, Disk]) -> None:
    """--rm makes podman ask for a volatile mount."""
    made, _ = podman
    assert "Read-only" in made.podman("run", "--rm", "--read-only", "tiny", "touch", "/x", status=(1,))
    made.podman("run", "-d", "--rm", "--name", "volatile", "tiny", "sleep", "100")
    made.podman("exec", "volatile", "touch", "/x")
    made.podman("commit", "-q", "volatile", "of-volatile")
    made.podman("rm", "--force", "--time", "0", "volatile")
    assert made.podman("run", "--rm", "of-volatile", "ls", "/x") == "/x\n"


def test_build(podman: tuple[Engine, Disk]) -> None:
    made, _ = podman
    context = made.base / "context"
    context.mkdir()
    (context / "file").write_text("data\n")
    (context / "Containerfile").write_text(
        "FROM tiny\nCOPY file /file\nRUN cat /file && echo built >/built && rm /bin/id\nRUN cat /built /file >/both\n"
    )
    made.podman("build", "-q", "-t", "built", str(context))
    assert made.podman("run", "--rm", "built", "sh", "-c", "cat /both; ls /bin/id || true").startswith("built\ndata\n")
    assert made.mounts() == []


def test_buildah_from_scratch(podman: tuple[Engine, Disk]) -> None:
    made, _ = podman
    container = made.run("buildah", "from", "scratch").strip()
    merged = made.run("buildah", "mount", container).strip()
    made.run("sh", "-c", f"mkdir {merged}/bin && cp /bin/busybox {merged}/bin/sh")
    made.run("buildah", "umount", container)
    made.run("buildah", "commit", "-q", container, "scratchy")
    made.run("buildah", "rm", container)
    assert made.podman("run", "--rm", "scratchy", "/bin/sh", "-c", "echo it runs") == "it runs\n"


def test_runc(podman: tuple[Engine, Disk]) -> None:
    made, _ = podman
    if subprocess.run(["which", "runc"], capture_output=True, check=False).returncode:
        pytest.skip("runc is not installed")
    words = ("--runtime", "runc", "run", "--rm", "--cgroups", "enabled", "tiny", "echo", "it runs")
    said = made.podman(*words, status=(0, 125, 126, 127))
    if "cgroup" in said:
        pytest.skip(f"runc does not run here: {said.strip()}")
    assert said == "it runs\n"


def test_every_container_is_told_of_a_lost_write(podman: tuple[Engine, Disk]) -> None:
    """The question of the thread, asked by podman: sync -f is syncfs on a new descriptor.

    The machine's sync: busybox's throws the answer away.
    """
    made, disk = podman
    names = ("one", "two", "three")
    volumes = [
        word for path in ("/usr", "/lib", "/lib64") for word in ("-v", f"{path}:{path}:ro") if os.path.exists(path)
    ]
    for name in names:
        made.podman("run", "-d", "--name", name, *volumes, "tiny", "sleep", "100")
        made.podman("exec", name, *_SYNC)
    disk.fail("data")
    made.podman("exec", "-i", "one", "sh", "-c", "cat >/lost", given=disk.marker * 4096)
    disk.push()
    disk.heal()
    for name in names:
        assert "Input/output error" in made.podman("exec", name, *_SYNC, status=(1,))
        made.podman("exec", name, *_SYNC)


def test_a_server_that_is_killed_leaves_containers_that_can_be_removed(podman: tuple[Engine, Disk]) -> None:
    made, _ = podman
    if "OVERT_SERVER" not in made.environment:
        pytest.skip("the shared server is the fixture's own")
    made.podman("run", "-d", "--name", "one", "tiny", "sleep", "100")
    target = made.mounts()[0].split()[1]
    entry = made.run("sh", "-c", f"grep -l {target} /run/overt/*:*")
    made.run("kill", "-9", entry.split(".")[1])
    assert "not connected" in made.podman("exec", "one", "ls", "/", status=(1, 125, 126, 127, 255))
    made.podman("rm", "--force", "--time", "0", "one")
    made.podman("run", "--rm", "tiny", "ls", "/")
