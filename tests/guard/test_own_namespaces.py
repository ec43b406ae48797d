"""Containers that do to themselves what a privileged one can: chroot, namespaces, overlays, listeners, thread ids."""

import os
import signal
import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from overt.host import files, mounts, process
from overt.lab import Disk

from .ground import EIO, Container, Ground, wait_until
from .lone import several

pytestmark = pytest.mark.root

EBUSY, EEXIST, EINVAL = 16, 17, 22
CLONE_NEWUSER, CLONE_NEWUSER_NEWNS = "10000000", "10020000"
ADMIN = ["CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_DAC_OVERRIDE"]


def test_a_process_with_its_own_listener_keeps_nobody_but_itself(guarded: Ground) -> None:
    """It takes notifications before the guard does, which then waits for the next: not on the loop's leader."""
    other = guarded.container()
    old = other.open()
    with guarded.nothing_kept():
        with several(guarded, 3, thief=True) as thieves:
            end = time.monotonic() + 3.0
            while time.monotonic() < end:
                for each in thieves:
                    with suppress(BlockingIOError):  # its call was stolen
                        each.go.send(b"!", socket.MSG_DONTWAIT)
                assert [other.syncfs(old) for _ in range(5)] == [0] * 5
            other.lose()
            assert [other.syncfs(old), other.syncfs(old), other.new_syncfs()] == [EIO, 0, 0]
        wait_until(lambda: len(guarded.guard.status()["containers"]) == 1, "they are let go")  # type: ignore[union-attr]


def test_a_container_cannot_have_a_second_listener(guarded: Ground) -> None:
    container = guarded.container()
    assert container.ask("listen") == EBUSY
    container.lose()
    assert [container.new_syncfs(), container.new_syncfs()] == [EIO, 0]


def test_descriptors_of_all_kinds_are_left_to_the_kernel(guarded: Ground) -> None:
    container = guarded.container()
    with guarded.nothing_kept():
        assert container.ask("odd") == 0
        container.lose()
        assert container.ask("odd") == 0
        assert container.new_syncfs() == EIO


def test_a_container_that_changes_its_root_is_told(guarded: Ground) -> None:
    container, other = guarded.container(capabilities=ADMIN), guarded.container()
    assert [container.ask("mkdir", "/jail"), container.ask("mkdir", "/jail/deeper")] == [0, 0]
    assert container.ask("chroot", "/jail") == 0
    assert container.new_syncfs() == 0
    old = container.open()
    container.lose()
    assert [container.new_syncfs("/deeper"), container.syncfs(old), container.syncfs(old)] == [EIO, EIO, 0]
    assert [other.new_syncfs(), other.new_syncfs()] == [EIO, 0]


def test_a_container_in_a_user_namespace_of_its_own_is_told(guarded: Ground) -> None:
    container = guarded.container()
    assert container.ask("unshare", CLONE_NEWUSER) == 0
    old = container.open()
    container.lose()
    assert [container.new_syncfs(), container.syncfs(old), container.syncfs(old)] == [EIO, EIO, 0]


def nest(container: Container, below: str, flags: str = "") -> int:
    """An overlay inside the container, with its upper in the directory `below`: 0, or why there is none."""
    for part in ("", "/lower", "/upper", "/work", "/merged"):
        assert container.ask("mkdir", below + part) in (0, EEXIST)
    options = f"lowerdir={below}/lower,upperdir={below}/upper,workdir={below}/work{flags}"
    return container.ask("mount", "overlay", f"{below}/merged", options)


def test_an_overlay_that_a_container_mounts_on_a_volume_is_told(guarded: Ground) -> None:
    other = guarded.container()
    volume = Path(guarded.disk.path, "volume")
    volume.mkdir()
    bind = {"destination": "/tmp", "source": str(volume), "type": "bind", "options": ["rbind"]}
    with guarded.nothing_kept():
        inner = guarded.container(capabilities=ADMIN, mounts=[bind])
        assert nest(inner, "/nest") == EINVAL  # the kernel puts no overlay's upper on an overlay
        assert nest(inner, "/tmp/nest") == 0
        assert inner.new_syncfs("/tmp/nest/merged") == 0
        old = inner.open("/tmp/nest/merged")
        inner.lose("/tmp/nest/merged/victim")
        assert [inner.new_syncfs("/tmp/nest/merged"), inner.syncfs(old), inner.syncfs(old)] == [EIO, EIO, 0]
        assert [inner.new_syncfs(), inner.new_syncfs()] == [EIO, 0]
        guarded.end(inner)
    assert [other.new_syncfs(), other.new_syncfs()] == [EIO, 0]
    assert sorted(each.name for each in volume.iterdir()) == ["nest"]


def test_an_overlay_that_takes_long_to_open_takes_one_thread(guarded: Ground) -> None:
    guard = guarded.guard
    assert guard is not None
    with Disk("ext4", size=64 << 20) as second:
        bind = {"destination": "/tmp", "source": second.path, "type": "bind", "options": ["rbind"]}
        with guarded.nothing_kept():
            container = guarded.container(capabilities=ADMIN, mounts=[bind])
            assert nest(container, "/tmp/nest") == 0
            fd = container.ask("write", "/tmp/nest/merged/data", second.marker.hex(), 1)
            second.hang()
            try:
                container.say("threads", fd, 300)
                wait_until(lambda: waiting(guarded) == 300, "all wait")
                assert len(os.listdir(f"/proc/{guard.worker}/task")) < 20
            finally:
                second.resume()
            assert container.hear() == [0, 0]
            container.lose("/victim")
            assert [container.syncfs(fd), container.new_syncfs("/tmp/nest/merged"), container.new_syncfs()] == [
                0,
                0,
                EIO,
            ]
            guarded.end(container)


def test_an_overlay_in_a_user_namespace_gets_at_most_an_error_for_itself(guarded: Ground) -> None:
    other = guarded.container()
    with guarded.nothing_kept():
        container = guarded.container(capabilities=ADMIN)
        old = container.open()
        assert container.ask("unshare", CLONE_NEWUSER_NEWNS) == 0
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{container.pid}/{name}").write_text("0 0 1")
        assert container.ask("mount", "tmpfs", "/tmp", "mode=0777") == 0
        assert nest(container, "/tmp/nest", ",userxattr") == 0
        assert container.new_syncfs("/tmp/nest/merged") in (0, EIO)
        container.lose()
        assert [container.syncfs(old), container.syncfs(old)] == [EIO, 0]
        guarded.end(container)
    assert [other.new_syncfs(), other.new_syncfs()] == [EIO, 0]


@pytest.mark.parametrize(("uuid", "answer"), [("on", 0), ("off", EIO)])
def test_an_overlay_that_its_container_covers_is_not_taken_for_one_of_the_hosts(
    guarded: Ground, tmp_path: Path, uuid: str, answer: int
) -> None:
    """What its options name is a directory of the host's as well, which it could not reach by itself."""
    guarded.container()
    private = tmp_path / "host" / "private"
    (private / "upper").mkdir(parents=True)

    def act(fd: int) -> int:
        make("tmpfs", private.parent)
        for part in ("upper", "work", "lower", "merged"):
            (private / part).mkdir(parents=True)
        options = {f"{part}dir": str(private / part) for part in ("lower", "upper", "work")}
        make("overlay", private / "merged", **options, uuid=uuid)
        inside = os.open(private / "merged", os.O_RDONLY)
        make("tmpfs", private / "merged")
        return inside

    with guarded.nothing_kept(), several(guarded, 1, act=act) as (each,):
        each.go.send(b"!")
        assert each.answer()[0] == answer
        assert os.listdir(private) == ["upper"]
    assert os.listdir(private) == ["upper"]


def test_a_workdir_that_leads_to_a_directory_of_the_hosts_is_not_followed(guarded: Ground) -> None:
    guarded.container()
    volume, host = Path(guarded.disk.path, "volume"), Path(guarded.disk.path, "host")
    host.mkdir()

    def act(fd: int) -> int:
        for part in ("upper", "inner/work", "lower", "merged"):
            (volume / part).mkdir(parents=True)
        options = {"lowerdir": "lower", "upperdir": "upper", "workdir": "inner/work"}
        make("overlay", volume / "merged", **{name: str(volume / part) for name, part in options.items()})
        (volume / "inner").rename(volume / "away")
        (volume / "inner").symlink_to(host)
        return os.open(volume / "merged", os.O_RDONLY)

    with guarded.nothing_kept(), several(guarded, 1, act=act) as (each,):
        each.go.send(b"!")
        assert each.answer()[0] == 0
        assert os.listdir(host) == []
        assert [name for name in os.listdir(volume) if name.startswith(".overt-guard-")]
    assert sorted(os.listdir(volume)) == ["away", "inner", "lower", "merged", "upper"]


def test_an_overlay_without_a_uuid_is_believed_where_the_host_has_it(guarded: Ground) -> None:
    container = guarded.container(flags=["uuid=off"])
    assert guarded.guard is not None
    status = guarded.guard.status
    wait_until(lambda: [each["guarded"] for each in status()["overlays"]] == [True], "the guard has taken it")
    container.lose()
    assert [container.new_syncfs(), container.new_syncfs()] == [EIO, 0]


def test_a_filesystem_that_only_its_user_may_ask_is_left_to_the_kernel(guarded: Ground) -> None:
    guarded.container()
    with guarded.nothing_kept(), several(guarded, 1, act=mount_as_another_user) as (each,):
        for _ in range(2):
            each.go.send(b"!")
            assert each.answer()[0] == 0


def test_mounts_without_end_keep_nobody_but_their_own_container(guarded: Ground) -> None:
    other = guarded.container()
    old = other.open()

    def act(fd: int) -> int:
        make("tmpfs", Path("/mnt"))
        for _ in range(3000):
            copy = mounts.clone("/mnt")
            mounts.attach(copy, "/mnt")
            os.close(copy)
        kinds = (os.pipe()[0], os.open(f"/proc/self/fd/{mounts.clone('/mnt')}", os.O_RDONLY))
        for number in range(60):
            threading.Thread(target=call_for_ever, args=(kinds[number % 2],), daemon=True).start()
        return fd

    with guarded.nothing_kept():
        with several(guarded, 1, act=act):
            took = []
            for _ in range(9):
                begun = time.monotonic()
                assert other.syncfs(old) == 0
                took.append(time.monotonic() - begun)
            assert len(os.listdir(f"/proc/{guarded.guard.worker}/task")) < 20  # type: ignore[union-attr]
            assert sorted(took)[4] < 0.5, took
        other.lose()
        assert [other.syncfs(old), other.syncfs(old)] == [EIO, 0]


def call_for_ever(fd: int) -> None:
    while True:
        files.syncfs(fd)


def make(kind: str, at: Path, **options: str) -> None:
    fd = mounts.new_mount(kind, list(options.items()))
    mounts.attach(fd, str(at))
    os.close(fd)


def mount_as_another_user(fd: int) -> int:
    """A FUSE filesystem that its own process serves as user 1000, whom alone it answers (no `allow_other`)."""
    device = os.open("/dev/fuse", os.O_RDWR)
    make("fuse", Path("/mnt"), source="x", fd=str(device), rootmode="40000", user_id="1000", group_id="1000")

    def serve() -> None:
        answers = {26: struct.pack("=IIIIHHII32x", 7, 31, 65536, 0, 12, 9, 65536, 1), 27: struct.pack("=QII", 1, 0, 0)}
        while True:
            opcode, unique = struct.unpack_from("=4xIQ", os.read(device, 1 << 18))
            body = answers.get(opcode)
            head = struct.pack("=IiQ", 16 + len(body or b""), 0 if body is not None else -38, unique)
            os.write(device, head + (body or b""))

    threading.Thread(target=serve, daemon=True).start()
    os.setresgid(1000, 1000, 1000)
    os.setresuid(1000, 1000, 1000)
    return os.open("/mnt", os.O_RDONLY)


def test_a_thread_id_that_is_another_process_by_now_takes_nothing(guarded: Ground) -> None:
    """The caller is killed while its call waits for the disk, and its id is given to another container's caller."""
    first, second = guarded.container(), guarded.container()
    fds = [each.ask("write", "/data", guarded.disk.marker.hex(), 1) for each in (first, second)]
    assert fds[0] == fds[1]
    guarded.disk.hang()
    try:
        first.say("child", fds[0])
        (tid,) = wait_for_child(first)
        wait_until(lambda: waiting(guarded) == 1, "it waits")
        os.kill(tid, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{tid}").exists(), "it is gone")
        again = 0
        for _ in range(200):
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(tid - 1))
            second.say("child", fds[1])
            (again,) = wait_for_child(second)
            if again == tid:
                break
            os.kill(again, signal.SIGKILL)
            wait_until(lambda: not process.children(second.pid), "it is gone")
        if again != tid:
            pytest.skip("the id went to others")
        wait_until(lambda: waiting(guarded) >= 2, "both calls are with the guard")
    finally:
        guarded.disk.fail("data")
        guarded.disk.resume()
    assert second.hear() == [EIO]
    assert [second.syncfs(fds[1]), second.new_syncfs()] == [0, 0]
    assert [first.syncfs(fds[0]), first.syncfs(fds[0])] == [EIO, 0]
    guarded.disk.heal()


def wait_for_child(container: Container) -> list[int]:
    wait_until(lambda: process.children(container.pid), "a child")
    return process.children(container.pid)


def waiting(ground: Ground) -> int:
    assert ground.guard is not None
    return sum(int(each["waiting"]) for each in ground.guard.status()["containers"])


def test_thousands_of_connections_and_half_messages_keep_nobody(guarded: Ground) -> None:
    assert guarded.guard is not None
    container = guarded.container()
    held = []
    with guarded.nothing_kept():
        try:
            for number in range(2000):
                caller = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                held.append(caller)
                caller.connect(str(guarded.guard.socket))
                if number % 3 == 0:
                    socket.send_fds(caller, [b'{"fds": ["seccompFd"], "pid": 1, "sta'], [caller.fileno()])
                elif number % 3 == 1:
                    caller.send(os.urandom(1000))
            assert [container.new_syncfs() for _ in range(3)] == [0, 0, 0]
            begun = time.monotonic()
            late = guarded.container()
            assert late.new_syncfs() == 0
            assert time.monotonic() - begun < 8
            guarded.end(late)
        finally:
            for each in held:
                each.close()
