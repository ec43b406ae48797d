"""Finding out which mount a call is about, when somebody makes that as slow as it gets."""

import contextlib
import errno
import itertools
import os
import resource
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from overt.guard import table
from overt.guard.line import Line
from overt.guard.table import Mounted, Table, Unknown
from overt.host import files, mounts

from .ground import wait_until
from .member import overlay, tmpfs

pytestmark = pytest.mark.timeout(60)


def place(fd: int) -> bytes:
    return b"/proc/self/fd/%d" % fd


def test_no_mountinfo_is_read_for_what_is_known_or_can_be_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    fds = [*os.pipe(), os.eventfd(0), os.memfd_create("nowhere"), os.open("/", os.O_RDONLY), os.open("/", os.O_RDONLY)]
    try:
        known = Table()
        with pytest.raises(Unknown):
            known.known(place(fds[-1]))
        assert isinstance(known.mount_of(place(fds[-1]), [os.getpid()]), Mounted)

        def read(pid: int) -> bytes:
            raise AssertionError("read again")

        monkeypatch.setattr(table, "_mountinfo", read)
        for fd in fds:
            known.known(place(fd))
            known.mount_of(place(fd), [os.getpid()])
            known.device_of(place(fd), os.getpid(), table.Walk())
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.root
def test_a_mount_that_is_nowhere_yet_is_looked_for_again(tmp_path: Path) -> None:
    mount = mounts.new_mount("tmpfs", [])
    fd = os.open(f"/proc/self/fd/{mount}", os.O_RDONLY)
    try:
        found = Table()
        for _ in range(2):
            assert isinstance(found.mount_of(place(fd), [os.getpid()]), int)
            with pytest.raises(Unknown):
                found.known(place(fd))
        mounts.attach(mount, str(tmp_path))
        seen = found.mount_of(place(fd), [os.getpid()])
        mounts.umount(str(tmp_path), mounts.MNT_DETACH)
        assert isinstance(seen, Mounted) and found.known(place(fd)) == seen
    finally:
        os.close(fd)
        os.close(mount)


def test_the_line_of_a_mount_is_found_and_no_other_is_parsed() -> None:
    line = b"%d 1 0:%d / /merged rw - overlay overlay rw,upperdir=/u\\0401,workdir=/w\n"
    text = b"".join(line % (number, number + 1) for number in (21, 2, 1, 12, 112)) + b"3 1 cannot be parsed\n"
    for number in (21, 2, 1, 12, 112):
        found = table._line(text, number)
        assert found == Mounted(os.makedev(0, number + 1), b"/merged", b"/u 1", b"/w", volatile=False)
    assert [table._line(text, number) for number in (4, 11, 212)] == [None] * 3
    assert table._line(b"", 1) is None


def test_in_a_line_a_few_threads_do_everything() -> None:
    line, free = Line(2), threading.Event()
    lock = threading.Lock()
    done: list[int] = []
    busy = most = 0

    def act(number: int) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        free.wait(20)
        with lock:
            busy -= 1
            done.append(number)

    acts: list[Callable[[], None]] = [partial(act, number) for number in range(50)]
    threads = [threading.Thread(target=line.do, args=(each,)) for each in acts]
    for thread in threads:
        thread.start()
    wait_until(
        lambda: busy == 2 and sum(thread.is_alive() for thread in threads) == 2, "all others have gone their way"
    )
    free.set()
    for thread in threads:
        thread.join(20)
    assert (sorted(done), most) == (list(range(50)), 2)
    line.do(partial(act, 50))
    assert done[-1] == 50


@pytest.mark.root
def test_a_mount_with_a_number_that_the_walk_saw_at_another_is_not_taken_for_that(tmp_path: Path) -> None:
    """The walk reads a mountinfo once; the kernel gives a mount's number in it to the next."""
    own = os.getpid()
    walk, known = table.Walk(), Table()
    earlier = [tmp_path / f"earlier-{number}" for number in range(8)]
    for each in earlier:
        each.mkdir()
        tmpfs(each)
    numbers = {files.whereabouts(os.fsencode(each), files.STATX_MNT_ID).mount for each in earlier}
    walk.mountinfo(own)
    for each in earlier:
        mounts.umount(str(each))
    for _ in range(100):
        device = overlay(tmp_path)
        fd = os.open(tmp_path / "merged", os.O_RDONLY)
        try:
            if files.whereabouts(place(fd), files.STATX_MNT_ID).mount in numbers:
                assert known.device_of(place(fd), own, walk) == device
                seen = known.known(place(fd))
                assert isinstance(seen, Mounted) and seen.lies
                return
        finally:
            os.close(fd)
            mounts.umount(str(tmp_path / "merged"))
        time.sleep(0.05)  # numbers are free a moment later
    pytest.skip("the kernel gave other numbers")


@pytest.mark.root
def test_who_does_not_see_a_mount_hides_it_from_nobody_in_a_walk(tmp_path: Path) -> None:
    """An overlay with layers on two filesystems: a file's st_dev is not the superblock's."""
    (tmp_path / "upper").mkdir()
    tmpfs(tmp_path / "upper")
    for part in ("lower", "merged", "upper/upper", "upper/work"):
        (tmp_path / part).mkdir()
    options = {"lowerdir": "lower", "upperdir": "upper/upper", "workdir": "upper/work"}
    mount = mounts.new_mount("overlay", [("xino", "off"), *((key, str(tmp_path / at)) for key, at in options.items())])
    mounts.attach(mount, str(tmp_path / "merged"))
    os.close(mount)
    fd = os.open(tmp_path / "merged" / "file", os.O_RDWR | os.O_CREAT)
    device = os.stat(tmp_path / "merged").st_dev
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.chroot(tmp_path / "lower")
        os.write(tell, b"!")
        threading.Event().wait(60)
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"!"
        walk, known = table.Walk(), Table()
        assert known.device_of(b"/proc/%d/fd/%d" % (child, fd), child, walk) == os.fstat(fd).st_dev != device
        assert known.device_of(b"/proc/%d/fd/%d" % (os.getpid(), fd), os.getpid(), walk) == device
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        for each in (fd, ready, tell):
            os.close(each)
        mounts.umount(str(tmp_path / "merged"))
        mounts.umount(str(tmp_path / "upper"))


@pytest.mark.root
def test_whoever_swaps_a_descriptor_while_its_mount_is_looked_for_has_no_mount_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay(tmp_path)
    both = [os.open(tmp_path / "merged", os.O_RDONLY), os.open(tmp_path, os.O_RDONLY)]
    right = [Table().mount_of(place(each), [os.getpid()]) for each in both]
    fd = os.dup(both[0])
    real, turns = files.whereabouts, iter(both)

    def asked(path: bytes, *mask: int) -> files.Whereabouts:
        if path == place(fd):
            os.dup2(next(turns, both[0]), fd)
        return real(path, *mask)

    monkeypatch.setattr(files, "whereabouts", asked)
    questions: tuple[Callable[[Table], Any], ...] = (
        lambda known: known.mount_of(place(fd), [os.getpid()]),
        lambda known: known.device_of(place(fd), os.getpid(), table.Walk()),
    )
    try:
        for ask, order in itertools.product(questions, itertools.product(both, repeat=4)):
            known, turns = Table(), iter(order)
            with contextlib.suppress(FileNotFoundError):
                ask(known)
            assert [known.mount_of(place(each), [os.getpid()]) for each in both] == right
    finally:
        for each in (fd, *both):
            os.close(each)
        mounts.umount(str(tmp_path / "merged"))  # and it is not busy


def test_a_walk_holds_no_file_while_mounts_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container can make that long, and let go of the file meanwhile."""
    fd = os.open("/", os.O_RDONLY)
    real, before, read = table._mountinfo, len(os.listdir("/proc/self/fd")), []

    def mountinfo(pid: int) -> bytes:
        read.append(len(os.listdir("/proc/self/fd")))
        return real(pid)

    monkeypatch.setattr(table, "_mountinfo", mountinfo)
    try:
        assert Table().device_of(place(fd), os.getpid(), table.Walk()) == os.fstat(fd).st_dev
        assert read == [before] * 2
    finally:
        os.close(fd)


@pytest.mark.parametrize("left", [0, 1])
def test_a_mount_that_there_is_no_descriptor_left_to_look_for_is_not_taken_for_nobodys(left: int) -> None:
    fd = os.open("/", os.O_RDONLY)
    known, free = Table(), os.dup(fd)
    os.close(free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + left, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            known.mount_of(place(fd), [os.getpid()])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(fd)


def test_nor_is_one_where_the_last_descriptor_was_taken_before_the_mounts_were_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(pid: int) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(table, "_mountinfo", full)
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        Table().mount_of(b"/proc/self/root", [os.getpid()])
