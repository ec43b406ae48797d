"""Disks that fail on demand, on real filesystems."""

import errno
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from overt.host import files
from overt.lab import FILESYSTEMS, Disk, filesystems

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

BLOCK = 4096


@pytest.fixture(params=list(FILESYSTEMS))
def disk(request: pytest.FixtureRequest) -> Iterator[Disk]:
    with Disk(request.param) as disk:
        yield disk


@pytest.fixture
def ext4() -> Iterator[Disk]:
    with Disk("ext4") as disk:
        yield disk


class Open:
    """A file or directory that is closed in any case."""

    def __init__(self, path: str, flags: int = os.O_RDWR | os.O_CREAT) -> None:
        self.fd = os.open(path, flags)

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def directory(path: str) -> Open:
    return Open(path, os.O_RDONLY | os.O_DIRECTORY)


def told(call: Callable[[], object]) -> int:
    """The errno that the call raises, or 0."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def page_of(disk: Disk, pages: int = 1) -> bytes:
    return (disk.marker * (BLOCK // len(disk.marker))) * pages


def test_a_failed_write_back_is_told_once_by_syncfs_and_once_by_fsync(disk: Disk) -> None:
    with directory(disk.path) as root, Open(f"{disk.path}/file") as file:
        os.write(file, page_of(disk, 16))
        disk.fail("data")
        disk.push()
        assert disk.counters().failed_writes > 0
        assert [told(lambda: files.syncfs(root)) for _ in range(2)] == [errno.EIO, 0]
        assert [told(lambda: os.fsync(file)) for _ in range(2)] == [errno.EIO, 0]
        disk.heal()
        os.pwrite(file, page_of(disk, 16), 0)
        assert told(lambda: os.fsync(file)) == 0
        assert told(lambda: files.syncfs(root)) == 0
    assert disk.marker in disk.snapshot(durable=True)


def test_a_data_fault_spares_metadata_and_other_files_beside_it(disk: Disk) -> None:
    with Open(f"{disk.path}/victim") as victim, Open(f"{disk.path}/bystander") as bystander:
        for _ in range(8):  # side by side on the disk, as far as the filesystem likes
            os.write(victim, page_of(disk))
            os.write(bystander, b"b" * BLOCK)
        disk.fail("data")
        disk.push()
        os.mkdir(f"{disk.path}/later")
        with directory(f"{disk.path}/later") as later:
            assert told(lambda: os.fsync(later)) == 0
        assert told(lambda: os.fsync(bystander)) == 0
        assert told(lambda: os.fsync(victim)) == errno.EIO
    assert disk.counters().failed_flushes == 0


def test_a_marker_of_ones_own_condemns_only_its_file(ext4: Disk) -> None:
    with Open(f"{ext4.path}/one") as one, Open(f"{ext4.path}/two") as two:
        os.write(one, b"first of two victims" * 1000)
        os.write(two, page_of(ext4))
        ext4.fail("data", marker=b"first of two victims")
        ext4.push()
        assert [told(lambda: os.fsync(one)), told(lambda: os.fsync(two))] == [errno.EIO, 0]


def test_when_everything_fails_fsync_says_so(disk: Disk) -> None:
    with Open(f"{disk.path}/file") as file:
        os.write(file, b"no marker in here")
        disk.fail("all")
        assert told(lambda: os.fsync(file)) != 0


def test_a_flush_that_fails_is_told_by_fsync_although_the_data_was_written(disk: Disk) -> None:
    with Open(f"{disk.path}/file") as file:
        os.write(file, page_of(disk))
        disk.fail("flush")
        assert told(lambda: os.fsync(file)) != 0
    assert disk.counters().failed_writes == 0
    assert disk.counters().failed_flushes > 0
    assert disk.marker in disk.snapshot()


def test_a_read_that_fails_is_told_and_succeeds_after_healing(disk: Disk) -> None:
    with Open(f"{disk.path}/file") as file:
        os.write(file, page_of(disk, 16))
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        disk.fail("read")
        assert told(lambda: os.pread(file, BLOCK, 0)) == errno.EIO
        disk.heal()
        assert os.pread(file, BLOCK, 0) == page_of(disk)
    assert disk.counters().failed_reads > 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_the_errno_asked_for_arrives(ext4: Disk, code: int) -> None:
    with Open(f"{ext4.path}/file") as file:
        os.write(file, page_of(ext4))
        ext4.fail("data", errno=code)
        assert told(lambda: os.fsync(file)) == code


def test_a_range_fails_and_what_lies_beside_it_does_not(ext4: Disk) -> None:
    ext4.fail("read", start=64 << 20, end=65 << 20)
    with Open(ext4.device, os.O_RDONLY | os.O_DIRECT) as device, mmap.mmap(-1, BLOCK) as page:

        def read(position: int) -> int:
            return told(lambda: os.preadv(device, [page], position))

        assert [read((64 << 20) - BLOCK), read(64 << 20), read(65 << 20)] == [0, errno.EIO, 0]


def test_faults_add_up_until_healed(ext4: Disk) -> None:
    with Open(f"{ext4.path}/file") as file:
        os.write(file, page_of(ext4))
        ext4.fail("data", marker=b"not in there")
        ext4.fail("data")
        assert told(lambda: os.fsync(file)) == errno.EIO


def test_the_counters_count_at_the_disk(disk: Disk) -> None:
    with directory(disk.path) as root, Open(f"{disk.path}/file") as file:
        files.syncfs(root)
        before = disk.counters()
        os.write(file, page_of(disk, 256))
        os.fsync(file)
        after = disk.counters()
    assert after.bytes_written - before.bytes_written >= 256 * BLOCK
    assert after.writes > before.writes
    assert after.flushes > before.flushes
    assert after.failed_writes == after.failed_flushes == 0


def test_a_disk_that_nobody_uses_is_quiet(disk: Disk) -> None:
    with directory(disk.path) as root:
        files.syncfs(root)
    before = disk.counters()
    time.sleep(0.5)
    assert disk.counters().writes == before.writes


def test_a_snapshot_holds_what_was_synced_and_not_what_is_cached(disk: Disk) -> None:
    with Open(f"{disk.path}/file") as file:
        os.write(file, page_of(disk))
        assert disk.marker not in disk.snapshot()
        os.fsync(file)
        assert disk.marker in disk.snapshot()
        assert disk.marker in disk.snapshot(durable=True)


def test_a_write_whose_flush_failed_is_acknowledged_but_not_durable(ext4: Disk) -> None:
    with Open(f"{ext4.path}/file") as file:
        os.write(file, page_of(ext4))
        ext4.fail("flush")
        assert told(lambda: os.fsync(file)) == errno.EIO
    assert ext4.marker in ext4.snapshot()
    assert ext4.marker not in ext4.snapshot(durable=True)


@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_after_a_power_cut_what_was_synced_is_there(filesystem: str, tmp_path: Path) -> None:
    with Disk(filesystem) as disk:
        with Open(f"{disk.path}/synced") as file:
            os.write(file, page_of(disk, 10))
            os.fsync(file)
            with directory(disk.path) as root:
                os.fsync(root)
        disk.snapshot(tmp_path / "image", durable=True)
        expected = page_of(disk, 10)
    with Disk(filesystem, image=tmp_path / "image") as after:
        assert Path(f"{after.path}/synced").read_bytes() == expected


def test_a_disk_that_hangs_holds_up_its_own_users_until_it_resumes_and_nobody_else(disk: Disk) -> None:
    with Disk("ext4") as other, Open(f"{disk.path}/file") as file, ThreadPoolExecutor(1) as pool:
        os.write(file, page_of(disk))
        disk.hang()
        try:
            stuck = pool.submit(os.fsync, file)
            with Open(f"{other.path}/file") as theirs:
                os.write(theirs, b"x" * BLOCK)
                assert told(lambda: os.fsync(theirs)) == 0
            time.sleep(0.2)
            assert not stuck.done()
        finally:
            disk.resume()
        assert stuck.result(10) is None


def test_a_forgotten_hang_ends_by_itself(ext4: Disk) -> None:
    with Open(f"{ext4.path}/file") as file:
        os.write(file, page_of(ext4))
        ext4.hang(limit=0.5)
        os.fsync(file)


def test_a_push_to_a_disk_that_hangs_times_out(ext4: Disk) -> None:
    with Open(f"{ext4.path}/file") as file:
        os.write(file, page_of(ext4))
        ext4.hang()
        with pytest.raises(TimeoutError):
            ext4.push(seconds=0.2)
        ext4.resume()
        ext4.push()


def test_disks_in_parallel_fail_each_for_itself() -> None:
    with ThreadPoolExecutor(3) as pool:
        disks = list(pool.map(lambda _: Disk("ext4"), range(3)))
        try:
            assert len({disk.device for disk in disks}) == len({disk.path for disk in disks}) == 3
            disks[1].fail("all")
            results = []
            for disk in disks:
                with Open(f"{disk.path}/file") as file:
                    os.write(file, page_of(disk))
                    results.append(told(lambda file=file: os.fsync(file)))  # type: ignore[misc]
            assert results == [0, errno.EIO, 0]
        finally:
            list(pool.map(Disk.close, disks))


@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_a_disk_is_ready_and_gone_within_a_second(filesystem: str) -> None:
    def up_and_down() -> float:
        begin = time.monotonic()
        Disk(filesystem).close()
        return time.monotonic() - begin

    assert any(up_and_down() < 1 for _ in range(5))  # the machine may be busy


def test_mkfs_options_and_mount_options_are_obeyed() -> None:
    with Disk("ext4", mkfs_options=("-L", "label"), mount_options="data=journal,noatime") as disk:
        line = next(line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {disk.path} " in line)
        assert "noatime" in line
        assert "data=journal" in line
        with Open(disk.device, os.O_RDONLY) as device:
            assert b"label" in os.pread(device, BLOCK, 0)


def test_a_directory_of_ones_own_is_mounted_on_and_kept(tmp_path: Path) -> None:
    with Disk("ext4", directory=tmp_path) as disk:
        assert disk.path == str(tmp_path)
        assert (tmp_path / "lost+found").exists()
    assert list(tmp_path.iterdir()) == []


def test_the_loop_devices_queue_is_given_back_with_merging_allowed() -> None:
    def settings(block: Path) -> tuple[int, int]:
        return int((block / "queue/nomerges").read_text()), int((block / "queue/max_sectors_kb").read_text())

    def is_free(block: Path) -> str | None:
        return None if (block / "loop/backing_file").exists() else (block / "diskseq").read_text()

    for _ in range(20):
        with Disk("ext4") as disk:
            block = Path("/sys/block") / os.path.basename(disk.device)
            nomerges, largest = settings(block)
            assert nomerges == 2
            assert largest <= 1024
        before = is_free(block)
        after = settings(block)
        if before and is_free(block) == before:
            break  # else somebody else on the machine was quick to take the device
    assert after[0] == 0
    assert after[1] >= largest


def test_a_missing_mkfs_is_one_line_that_names_the_package() -> None:
    with pytest.raises(FileNotFoundError, match=r"mkfs\.none is not installed; the package none-progs has it"):
        filesystems.program("mkfs.none", "none-progs")


def test_a_mkfs_that_fails_is_quoted_and_nothing_is_left() -> None:
    with pytest.raises(OSError, match=r"mke2fs .*invalid option"):
        Disk("ext4", mkfs_options=("-Y",))


def test_mount_options_that_are_refused_are_quoted() -> None:
    with pytest.raises(OSError, match="nonsense"):
        Disk("ext4", mount_options="nonsense")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda disk: Disk("fat"), "ext4, ext4-nojournal, xfs, btrfs"),
        (lambda disk: disk.fail("sometimes"), "cannot fail 'sometimes'"),
        (lambda disk: disk.fail("flush", marker=b"x"), "marker"),
    ],
)
def test_what_the_lab_does_not_know_is_a_value_error(ext4: Disk, call: Callable[[Disk], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(ext4)
