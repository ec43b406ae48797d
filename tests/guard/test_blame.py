"""`--blame owner`: only the container whose file was lost is told; where that is not certain, all are."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from overt.guard import victims
from overt.guard.container import image, parse
from overt.host.files import birth_time
from overt.host.libc import AT_FDCWD
from overt.upper.upper import Failed

from .ground import EIO, SOURCE, Container, Ground, fail, wait_until

pytestmark = pytest.mark.root


@pytest.fixture
def blaming(bare: Ground) -> Ground:
    bare.start_guard("--blame", "owner")
    return bare


def three(ground: Ground) -> list[Container]:
    return [ground.container(runtime) for runtime in ("runc", "crun", "runc")]


def told(container: Container, old: int) -> list[int]:
    """What a new descriptor is told, the old one, and both once more."""
    return [container.new_syncfs(), container.syncfs(old), container.syncfs(old), container.new_syncfs()]


def test_the_victim_is_told_and_bystanders_are_not(blaming: Ground) -> None:
    containers = three(blaming)
    olds = [each.open() for each in containers]
    for victim in (1, 0):
        containers[victim].lose(f"/victim-{victim}")
        for at, (each, old) in enumerate(zip(containers, olds, strict=True)):
            assert told(each, old) == ([EIO, EIO, 0, 0] if at == victim else [0] * 4), (victim, at)
    assert blaming.host_syncfs() == EIO
    assert blaming.guard is not None
    lost = [(each["container"], each["path"], each["certain"]) for each in blaming.guard.events("file lost")]
    assert lost == [(containers[victim].id, f"/victim-{victim}", True) for victim in (1, 0)]
    errors = blaming.guard.status()["uppers"][0]["errors"]
    assert [[each["path"] for each in error["lost"]] for error in errors] == [["/victim-1"], ["/victim-0"]]
    assert [error["told"] for error in errors] == [1, 1]


def test_a_lost_files_name_says_nothing_to_the_terminal(blaming: Ground) -> None:
    victim = blaming.container()
    victim.lose("/\x1b[31mred")
    assert victim.new_syncfs() == EIO
    assert blaming.guard is not None
    words = [sys.executable, "-m", "overt", "guard", "status", "--socket", str(blaming.guard.socket)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30, env=environment).stdout
    assert f"lost: /\\x1b[31mred in {victim.id}" in said
    assert all(line.isprintable() for line in said.splitlines())


def test_the_owner_is_told_whoever_asks_first_and_whatever_dies_meanwhile(blaming: Ground) -> None:
    containers = three(blaming)
    assert blaming.guard is not None
    old = containers[2].open()
    blaming.guard.kill_worker()
    containers[2].lose()
    assert [each.new_syncfs() for each in containers[:2]] == [0, 0]
    blaming.guard.kill_worker()
    assert told(containers[2], old) == [EIO, EIO, 0, 0]
    assert [each.new_syncfs() for each in containers[:2]] == [0, 0]


def test_of_a_file_without_a_name_all_are_told(blaming: Ground) -> None:
    containers = three(blaming)
    fd = containers[0].ask("write", "/victim", blaming.disk.marker.hex(), 1)
    assert containers[0].ask("unlink", "/victim") == 0
    blaming.disk.fail("data")
    fail(blaming.disk)
    assert [each.new_syncfs() for each in containers] == [EIO] * 3
    assert containers[0].syncfs(fd) == EIO


def test_of_the_hosts_own_file_all_are_told(blaming: Ground) -> None:
    containers = three(blaming)
    fd = os.open(f"{blaming.disk.path}/host", os.O_WRONLY | os.O_CREAT)
    os.write(fd, blaming.disk.marker * 256)
    os.close(fd)
    fail(blaming.disk)
    assert [each.new_syncfs() for each in containers] == [EIO] * 3


def test_who_has_the_inode_number_now_is_not_blamed_for_what_was_before(blaming: Ground) -> None:
    containers = three(blaming)
    fd = containers[0].lose()
    number = (containers[0].upper / "victim").stat().st_ino
    assert [containers[0].ask("close", fd), containers[0].ask("unlink", "/victim")] == [0, 0]
    for again in range(2000):
        containers[1].ask("close", containers[1].ask("write", f"/new-{again}", "00", 1))
        if (containers[1].upper / f"new-{again}").stat().st_ino == number:
            break
    else:
        pytest.fail("the inode number is not given away again")
    assert [each.new_syncfs() for each in containers] == [EIO] * 3


def test_an_owner_that_was_started_again_meanwhile_is_not_told_so_all_others_are(blaming: Ground) -> None:
    bystander, owner = three(blaming)[:2]
    blaming.disk.fail("data")
    owner.ask("write", "/victim", blaming.disk.marker.hex(), 1)
    blaming.end(owner)
    fail(blaming.disk)
    again = blaming.container(again=owner.number)  # its account begins after the error
    assert (again.upper / "victim").exists()
    assert bystander.new_syncfs() == EIO
    assert again.new_syncfs() == 0


def test_of_a_file_that_has_failed_before_it_was_this_containers_all_are_told(blaming: Ground) -> None:
    """Two errors that nobody was told of, in one inode: the first was of the container that ended."""
    bystander, owner = three(blaming)[:2]
    blaming.disk.fail("data")
    owner.ask("write", "/victim", blaming.disk.marker.hex(), 1)
    blaming.end(owner)
    fail(blaming.disk)
    again = blaming.container(again=owner.number)
    again.lose()
    assert [bystander.new_syncfs(), again.new_syncfs()] == [EIO, EIO]


def test_so_they_are_where_both_are_seen_at_one_look(tmp_path: Path) -> None:
    """Nobody has asked in between: the number was another file's at the first event, and is this one's at the last."""
    (tmp_path / "victim").touch()
    st = os.stat(tmp_path / "victim")
    born = birth_time(AT_FDCWD, os.fsencode(tmp_path / "victim"))
    assert born is not None
    at = born - (time.time() - time.monotonic())
    overlay = Mock(upper=Mock(s_dev=st.st_dev), upper_directory=lambda: os.open(tmp_path, os.O_RDONLY))
    for first, owners in ((at - 9, None), (at + 4, {overlay})):
        failed = {st.st_ino: Failed(1, first, at + 5)}
        assert victims.owners(failed, victims.find([overlay], failed, 10)) == owners


def test_without_blame_all_are_told_and_the_file_is_named(guarded: Ground) -> None:
    containers = three(guarded)
    containers[1].lose()
    assert [each.new_syncfs() for each in containers] == [EIO] * 3
    guard = guarded.guard
    assert guard is not None
    wait_until(lambda: guard.events("file lost"), "the file is named")
    (event,) = guard.events("file lost")
    assert (event["container"], event["path"]) == (containers[1].id, "/victim")


def test_no_owner_is_certain_of_what_is_not_found_or_not_known() -> None:
    assert victims.owners(None, {}) is None
    assert victims.owners({}, {}) is None
    assert victims.owners({1: Failed(1, 0.0, 0.0)}, {}) is None


@pytest.mark.parametrize(
    ("annotations", "name"),
    [({"io.kubernetes.cri.image-name": "docker.io/library/redis:7"}, "docker.io/library/redis:7"), ({}, ""), (7, "")],
)
def test_the_image_is_what_the_engine_has_noted(annotations: object, name: str) -> None:
    said = {"fds": ["seccompFd"], "pid": 3, "state": {"id": "c", "bundle": "/nowhere", "annotations": annotations}}
    assert image(parse(json.dumps(said).encode())) == name


def test_the_image_is_found_in_the_bundle_and_in_podmans_records(tmp_path: Path) -> None:
    bundle = tmp_path / "storage" / "c" / "userdata"
    bundle.mkdir(parents=True)
    said = {"fds": ["seccompFd"], "pid": 3, "state": {"id": "c", "bundle": str(bundle)}}
    state = parse(json.dumps(said).encode())
    assert image(state) == ""
    record = {"id": "c", "image": "sha", "metadata": json.dumps({"image-name": "debian:12"})}
    (tmp_path / "storage" / "containers.json").write_text(json.dumps([{"id": "other"}, record]))
    assert image(state) == "debian:12"
    (bundle / "config.json").write_text(json.dumps({"annotations": {"org.opencontainers.image.ref.name": "alpine"}}))
    assert image(state) == "alpine"
