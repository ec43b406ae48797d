"""Random reads, writes, mappings, direct I/O and holes against a model (fsx.py), by one client and by two at once."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from overt.host import mounts

from .ground import Failed, Ground, Overlay, ground, image, kill_group, prefix, run
from .tree import differences, manifest, plant

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

FSX = [sys.executable, "-I", "-S", str(Path(__file__).with_name("fsx.py"))]

APPEND = """
import os, sys
name, path = sys.argv[1], sys.argv[2]
won = 0
log = os.open(f"{path}/log", os.O_WRONLY | os.O_APPEND)
for number in range(1000):
    os.write(log, f"{name} {number:06}\\n".encode())
    try:
        os.close(os.open(f"{path}/names/{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        won += 1
    except FileExistsError:
        pass
    os.stat(f"{path}/names/{number}")
print(won)
"""


def together(commands: list[list[str]], output: Path, timeout: float = 90) -> list[str]:
    """Run commands at once, each in a mount namespace of its own; return what they printed."""
    running = []
    try:
        for number, command in enumerate(commands):
            with open(output / f"out{number}", "wb") as file:
                words = [*prefix(None), "unshare", "--mount", *command]
                running.append(subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True))
        statuses = [process.wait(timeout) for process in running]
    finally:
        for process in running:
            kill_group(process)
    printed = [(output / f"out{number}").read_text() for number in range(len(commands))]
    if any(statuses):
        raise Failed("\n".join(printed))
    return printed


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)])
def test_twenty_thousand_operations_leave_what_the_model_says(overlay: Overlay, tmp_path: Path, seed: int) -> None:
    (overlay.path / "file").touch()
    run(*FSX, overlay.path / "file", tmp_path / "model", "--seed", str(seed), "--operations", "20000", timeout=100)


@pytest.mark.parametrize("options", ["volatile", "volatile,nopassthrough"])
def test_a_volatile_mount_where_synchronous_writes_go_another_way_is_no_different(
    layers: Ground, tmp_path: Path, options: str
) -> None:
    overlay = layers.overlay(options=options)
    (overlay.path / "file").touch()
    words = ["--seed", "4", "--operations", "5000", "--o-sync"]
    run(*FSX, overlay.path / "file", tmp_path / "model", *words, timeout=60)


@pytest.mark.long
@pytest.mark.parametrize("filesystem", ["xfs", "btrfs"])
def test_other_filesystems_as_the_upper_do_as_well(tmp_path: Path, filesystem: str, data_path: str) -> None:
    with image(filesystem, 1 << 30) as path:
        (path / "layers").mkdir()
        with ground(path / "layers", tmp_path / "server.log") as layers:
            overlay = layers.overlay(options=data_path)
            (overlay.path / "file").touch()
            words = ["--seed", "5", "--operations", "10000"]
            run(*FSX, overlay.path / "file", tmp_path / "model", *words, timeout=100)


def test_a_lower_file_that_is_open_and_mapped_is_copied_up_and_goes_on(
    layers: Ground, data_path: str, tmp_path: Path
) -> None:
    lower = layers.directory / "lower"
    lower.mkdir()
    for seed in range(8):
        content = random.Random(seed).randbytes(100_000)
        (lower / f"file{seed}").write_bytes(content)
    overlay = layers.overlay(lower, data_path)
    # With passthrough, who has opened the lower file for reading before the copy-up goes on reading that one.
    order = ["--reader-first"] if data_path else []
    for seed in range(8):
        model = tmp_path / f"model{seed}"
        run(*FSX, overlay.path / f"file{seed}", model, "--seed", str(seed), "--operations", "400", *order)
        assert (lower / f"file{seed}").read_bytes() == random.Random(seed).randbytes(100_000)


def test_two_clients_see_each_others_every_operation(overlay: Overlay, tmp_path: Path) -> None:
    (overlay.path / "file").touch()
    command = [*FSX, str(overlay.path / "file"), str(tmp_path / "model"), "--turns", "--operations", "5000", "--seed"]
    together([[*command, str(seed)] for seed in (1, 2)], tmp_path)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("operations", [1_000, pytest.param(500_000, marks=pytest.mark.long)])
def test_what_two_clients_leave_is_the_same_after_a_new_mount_and_when_the_kernel_reads_the_layers(
    layers: Ground, data_path: str, tmp_path: Path, operations: int
) -> None:
    """A file of the upper, one of the lower layer, and a tree of which some is renamed and some removed."""
    lower = layers.directory / "lower"
    lower.mkdir()
    plant(lower / "tree", 200)
    (lower / "lower").write_bytes(random.Random(1).randbytes(100_000))
    overlay = layers.overlay(lower, data_path)
    (overlay.path / "upper").touch()
    commands = [
        [*FSX, str(overlay.path / name), str(tmp_path / name), "--seed", str(seed), "--operations", str(operations)]
        for seed, name in ((11, "upper"), (12, "lower"))
    ]
    together(commands, tmp_path, timeout=1700)
    for number, path in enumerate(sorted(overlay.path.joinpath("tree").rglob("file *"))):
        if number % 3 == 0:
            path.rename(path.with_name(f"renamed {number}"))
        elif number % 3 == 1:
            path.unlink()
    wanted = manifest(overlay.path)
    layers.umount(overlay)
    layers.remount(overlay)
    assert not differences(wanted, manifest(overlay.path))
    layers.umount(overlay)
    words = f"lowerdir={lower},upperdir={overlay.upper},workdir={overlay.work},index=off,xino=off"
    run("mount", "-t", "overlay", "overlay", "-o", words, overlay.path)
    try:
        assert not differences(wanted, manifest(overlay.path))
    finally:
        mounts.umount(overlay.path)


def test_two_clients_append_and_race_for_names_without_losing_any(overlay: Overlay, tmp_path: Path) -> None:
    (overlay.path / "names").mkdir()
    (overlay.path / "log").touch()
    command = [sys.executable, "-I", "-S", "-c", APPEND]
    won = together([[*command, name, str(overlay.path)] for name in ("one", "two")], tmp_path)
    assert sum(map(int, won)) == 1000
    lines = (overlay.path / "log").read_text().splitlines()
    assert sorted(lines) == sorted(f"{name} {number:06}" for name in ("one", "two") for number in range(1000))
    assert sorted(os.listdir(overlay.path / "names"), key=int) == [str(number) for number in range(1000)]
    assert sorted(os.listdir(overlay.upper / "names")) == sorted(os.listdir(overlay.path / "names"))
