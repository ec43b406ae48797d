"""Real containers on kernel overlayfs: who is told of an error, with the guard and without."""

import os

import pytest

from overt.lab import Disk

from .ground import EBADF, EIO, ENOSYS, RUNTIMES, Container, Ground, wait_until

pytestmark = pytest.mark.root

MANY = [
    5,
    pytest.param(50, marks=[pytest.mark.long, pytest.mark.timeout(600)]),
]


def start(ground: Ground, many: int) -> list[tuple[Container, int, int]]:
    """Containers of both kinds in turn, and two descriptors in each that were open before the error."""
    containers = [ground.container(RUNTIMES[number % 2]) for number in range(many)]
    return [(each, each.open("/"), each.open("/file")) for each in containers]


@pytest.mark.parametrize("many", MANY)
def test_without_a_guard_nobody_is_told(bare: Ground, many: int) -> None:
    containers = start(bare, many)
    containers[0][0].lose()
    told = [(each.new_syncfs(), each.syncfs(directory), each.syncfs(file)) for each, directory, file in containers]
    assert told == [(0, 0, 0)] * many
    assert bare.host_syncfs() == EIO


@pytest.mark.parametrize("many", MANY)
def test_each_open_descriptor_in_each_container_is_told_once(guarded: Ground, many: int) -> None:
    containers = start(guarded, many)
    writer = containers[0][0].lose()
    assert guarded.host_syncfs() == EIO  # the host first: it hides nothing
    for each, directory, file in containers:
        assert [each.new_syncfs(), each.new_syncfs()] == [EIO, 0]
        assert [each.syncfs(directory), each.syncfs(directory)] == [EIO, 0]
        duplicate = each.ask("dup", file)
        assert [each.syncfs(duplicate), each.syncfs(file)] == [EIO, 0]
    assert [containers[0][0].syncfs(writer), containers[0][0].syncfs(writer)] == [EIO, 0]
    again = containers[-1][0].lose("/again")
    assert [(each.syncfs(directory), each.new_syncfs()) for each, directory, _ in containers] == [(EIO, 0)] * many
    assert containers[-1][0].syncfs(again) == EIO


def test_a_new_descriptor_is_told_if_nobody_was_and_one_opened_after_that_is_not(guarded: Ground) -> None:
    one, other = guarded.container(), guarded.container()
    one.lose()
    late = one.open()
    assert one.new_syncfs() == EIO
    assert [one.syncfs(late), one.new_syncfs()] == [EIO, 0]  # it was open when the first was told
    assert [other.new_syncfs(), other.new_syncfs()] == [EIO, 0]


def test_an_error_from_before_the_container_is_not_told_to_it(guarded: Ground) -> None:
    first = guarded.container()
    first.lose()
    assert first.new_syncfs() == EIO
    second = guarded.container("runc")
    assert [second.new_syncfs(), second.new_syncfs()] == [0, 0]
    second.lose()
    assert [second.new_syncfs(), first.new_syncfs()] == [EIO, EIO]


def test_being_told_does_not_take_the_error_from_the_host(guarded: Ground) -> None:
    container = guarded.container()
    container.lose()
    assert container.new_syncfs() == EIO
    assert guarded.host_syncfs() == EIO


def test_the_very_call_that_meets_the_error_is_told(guarded: Ground) -> None:
    container = guarded.container()
    fd = container.ask("write", "/victim", guarded.disk.marker.hex(), 1)
    guarded.disk.fail("data")
    assert container.syncfs(fd) == EIO
    guarded.disk.heal()
    assert container.syncfs(fd) == 0


def test_a_process_that_joins_a_container_shares_its_state(guarded: Ground) -> None:
    for runtime in RUNTIMES:
        container = guarded.container(
            runtime,
            mounts=[
                {"destination": path, "source": path, "type": "bind", "options": ["rbind", "ro"]}
                for path in ("/usr", "/lib", "/lib64") if os.path.isdir(path)
            ],
        )  # fmt: skip
        old = container.open()
        assert container.execute("/usr/bin/sync", "-f", "/") == 0
        container.lose(f"/victim-of-{runtime}")
        assert [container.execute("/usr/bin/sync", "-f", "/") for _ in range(2)] == [1, 0]
        assert [container.new_syncfs(), container.syncfs(old), container.syncfs(old)] == [0, EIO, 0]


@pytest.mark.parametrize("call", ["i386", "x32"])
def test_a_call_by_another_abi_is_told(guarded: Ground, call: str) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("other ABIs are tried on x86-64 only")
    container = guarded.container()
    fd = container.open()
    assert container.ask(call, fd) == 0
    assert container.ask(call, 12345) in (EBADF, ENOSYS)  # the kernel's answer: it may be built without that ABI
    container.lose()
    assert [container.ask(call, fd), container.ask(call, fd)] == [EIO, 0]


def test_what_is_no_overlay_file_is_left_to_the_kernel(guarded: Ground) -> None:
    container = guarded.container()
    container.lose()
    assert container.syncfs(12345) == EBADF
    assert container.syncfs(container.ask("path", "/")) == EBADF
    assert container.new_syncfs("/proc") == 0
    assert container.syncfs(0) == 0  # a pipe
    assert container.new_syncfs() == EIO


def test_the_state_of_a_shared_description_is_shared_with_a_child(guarded: Ground) -> None:
    container = guarded.container()
    first, second = container.open(), container.open()
    assert container.ask("fork") == 0  # the child has everything, and goes on
    container.lose()
    assert [container.syncfs(first), container.syncfs(first)] == [EIO, 0]
    assert [container.syncfs(second), container.new_syncfs()] == [EIO, 0]


def test_a_volatile_overlay_is_left_to_the_kernel_which_is_right(guarded: Ground) -> None:
    ordinary, volatile = guarded.container(), guarded.container(flags=["volatile"])
    ordinary.lose()
    assert [volatile.new_syncfs() for _ in range(3)] == [EIO] * 3
    assert ordinary.new_syncfs() == EIO


def test_a_description_in_a_sockets_queue_is_the_one_that_is_missed(guarded: Ground) -> None:
    """Documented: docs/guard.md."""
    container = guarded.container()
    fd = container.open()
    assert container.ask("send", fd) == 0
    container.lose()
    assert container.new_syncfs() == EIO
    assert container.syncfs(container.ask("receive")) == 0


def test_nothing_is_left_when_the_last_container_ends(guarded: Ground) -> None:
    containers = [guarded.container(), guarded.container()]
    containers[0].open()
    containers[0].lose()
    assert containers[0].new_syncfs() == EIO
    assert guarded.guard is not None
    for container in containers:
        guarded.end(container)
    wait_until(lambda: not guarded.guard.status()["uppers"], "the upper is let go")  # type: ignore[union-attr]
    status = guarded.guard.status()
    assert (status["containers"], status["overlays"], status["crashes"]) == ([], [], 0)
    wait_until(lambda: not scratch_of(guarded), "its own directories are removed")
    wait_until(lambda: not descriptors_on(guarded), "no descriptor on the upper is kept")


def scratch_of(ground: Ground) -> list[str]:
    return [name for name in os.listdir(ground.disk.path) if name.startswith(".overt")]


def descriptors_on(ground: Ground) -> list[str]:
    """What the guard's processes have open on the disk."""
    assert ground.guard is not None
    found = []
    for pid in (ground.guard.process.pid, ground.guard.worker):
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                path = os.readlink(f"/proc/{pid}/fd/{name}")
            except FileNotFoundError:
                continue
            if path.startswith(ground.disk.path) or "seccomp" in path:
                found.append(path)
    return found


def test_what_is_held_and_closed_by_everybody_else_is_let_go(guarded: Ground) -> None:
    container = guarded.container()
    fds = [container.open() for _ in range(3)]
    container.lose()
    assert container.new_syncfs() == EIO
    assert guarded.guard is not None

    def owed() -> int:
        return int(guarded.guard.status()["overlays"][0]["owed"])  # type: ignore[union-attr]

    wait_until(lambda: owed() == 4, "who was told is let go; the writer is owed, too")
    container.ask("close", fds[0])
    wait_until(lambda: owed() == 3, "the closed one is let go", 30)
    assert [container.syncfs(fd) for fd in fds[1:]] == [EIO, EIO]
    wait_until(lambda: owed() == 1, "the others are told")


def test_two_overlays_in_one_container_are_told_apart(guarded: Ground) -> None:
    with Disk("ext4", size=64 << 20) as second:
        other = guarded.container(disk=second)
        bind = {"destination": "/tmp", "source": str(other.root), "type": "bind", "options": ["rbind"]}
        container = guarded.container(mounts=[bind])
        other.lose()
        assert [container.new_syncfs(), container.new_syncfs("/tmp"), container.new_syncfs("/tmp")] == [0, EIO, 0]
        assert other.new_syncfs() == 0  # one overlay, told once, in whichever container
        container.lose()
        assert [other.new_syncfs(), container.new_syncfs("/tmp"), container.new_syncfs()] == [0, 0, EIO]
        for each in (container, other):
            guarded.end(each)
        assert guarded.guard is not None
        wait_until(lambda: not guarded.guard.status()["uppers"], "the disks are let go")  # type: ignore[union-attr]


def test_containers_that_end_at_once_leave_nothing(guarded: Ground) -> None:
    assert guarded.guard is not None
    for number in range(6):
        container = guarded.container(RUNTIMES[number % 2], wait=False)
        guarded.end(container)
    wait_until(lambda: not guarded.guard.status()["containers"], "all are let go")  # type: ignore[union-attr]
    wait_until(lambda: not scratch_of(guarded) and not descriptors_on(guarded), "nothing is kept")
    assert guarded.guard.status()["crashes"] == 0
