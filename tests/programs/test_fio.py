"""fio writes in random order, and reads back what it has written by its checksums."""

import pytest

from .ground import Overlay, run

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

# How fio does I/O; several jobs, so that several files and processes are at work at once.
ENGINES = {
    "psync": ["--ioengine=psync", "--fsync=64"],
    "mmap": ["--ioengine=mmap", "--fsync=64"],
    "direct": ["--ioengine=libaio", "--iodepth=16", "--direct=1"],
    "pvsync2": ["--ioengine=pvsync2", "--fdatasync=32"],
}


@pytest.mark.parametrize("size", ["32m", pytest.param("256m", marks=pytest.mark.long)])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_written_in_random_order_reads_back(overlay: Overlay, engine: str, size: str) -> None:
    job = [
        "--name=load", f"--directory={overlay.path}", f"--size={size}", "--numjobs=3", "--group_reporting",
        *ENGINES[engine], "--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", "--fallocate=none", "--randseed=7",
        "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_backlog=512",
    ]  # fmt: skip
    said = run("fio", *job, timeout=150)
    assert "err= 0" in said and "verify:" not in said
    # Once more with the pages out of the cache, by what fio's headers in the blocks say.
    run("fio", *job, "--verify_only=1", "--invalidate=1", timeout=150)


@pytest.mark.parametrize("engine", ["psync", "mmap"])
def test_overwriting_and_reading_at_once_is_verified(overlay: Overlay, engine: str) -> None:
    run(
        "fio", "--name=load", f"--directory={overlay.path}", "--size=8m", "--numjobs=2", f"--ioengine={engine}",
        "--rw=randrw", "--bs=4k", "--time_based", "--runtime=2", "--verify=crc32c", "--verify_fatal=1",
        "--fallocate=none", timeout=60,
    )  # fmt: skip
