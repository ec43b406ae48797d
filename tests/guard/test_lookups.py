"""Finding out which mount a call is about, when somebody makes that as slow as it gets."""

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from overt.guard import table
from overt.guard.line import Line
from overt.guard.table import Mounted, Table, Unknown
from overt.host import mounts

from .ground import wait_until

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
