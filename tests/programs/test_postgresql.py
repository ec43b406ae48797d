"""PostgreSQL: its own load, a crash, and a checkpoint that must not go on when it is told that a table was lost.

When fsync fails, PostgreSQL cannot know which pages are gone, so it stops with a PANIC and replays its log
(data_sync_retry=off). That is worth as much as the filesystem's fsync is: if it answers 0, the log is recycled and the
pages are gone for good.
"""

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from overt.lab import Disk

from .cluster import Cluster, cluster
from .ground import MOSTLY_PASSTHROUGH, Failed, Ground, Overlay, ground

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

ROWS = 2000


def consistent(database: Cluster) -> bool:
    """Whether the four sums that pgbench keeps equal are equal."""
    sums = [f"select sum({column}) from pgbench_{table}" for table, column in (
        ("accounts", "abalance"), ("tellers", "tbalance"), ("branches", "bbalance"), ("history", "delta"),
    )]  # fmt: skip
    return len({database.sql(query) for query in sums}) == 1


@MOSTLY_PASSTHROUGH
@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.long)])
def test_pgbench_runs_and_what_it_committed_survives_a_crash(overlay: Overlay, seconds: int) -> None:
    with cluster(overlay.path / "pg") as database:
        database.call("pgbench", "-i", "-q", "-s", "3")
        database.call("pgbench", "-c", "4", "-j", "2", "-T", str(seconds), timeout=seconds + 90)
        database.sql("checkpoint")
        database.call("pgbench", "-n", "-c", "4", "-j", "2", "-t", "100", timeout=120)
        assert consistent(database)
        done = database.sql("select count(*) from pgbench_history")
        database.stop(signal.SIGQUIT)
        database.start()
        assert "database system was not properly shut down" in database.said()
        assert database.sql("select count(*) from pgbench_history") == done
        assert consistent(database)
        database.call("pg_amcheck", "--install-missing", "--heapallindexed", "postgres")
        database.stop()
        database.call("pg_checksums", "--check", "-D", str(database.data))
        assert "PANIC" not in database.said()


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[tuple[Disk, Ground]]:
    """Layers on a disk that fails on demand."""
    with Disk("ext4", size=1 << 30) as disk:
        directory = Path(tempfile.mkdtemp(dir=disk.path))
        directory.chmod(0o755)
        with ground(directory, tmp_path / "server.log", expected=("file lost",)) as layers:
            yield disk, layers


def fill_table(database: Cluster, disk: Disk) -> None:
    """A table of rows that hold the disk's marker; on the disk is their log, and not yet the table."""
    database.sql("create table lost (id integer, content bytea); alter table lost alter content set storage plain")
    database.sql("checkpoint")
    row = f"decode('{disk.marker.hex()}', 'hex') || n::text::bytea"
    database.sql(f"insert into lost select n, {row} from generate_series(1, {ROWS}) n")
    # The log has the marker too. It is on the disk already, and from here on the log is written to another file.
    database.sql("select pg_switch_wal(); create table other (id integer)")


def whole(database: Cluster, disk: Disk) -> bool:
    rows = f"select count(*) from lost where content = decode('{disk.marker.hex()}', 'hex') || id::text::bytea"
    return database.sql(rows) == str(ROWS)


def panicked(database: Cluster) -> bool:
    """Whether a CHECKPOINT ends the server, with a PANIC for the fsync of a table's file."""
    with pytest.raises(Failed):
        database.sql("checkpoint")
    assert database.ended() != 0
    return any("PANIC" in line and 'could not fsync file "base/' in line for line in database.said().splitlines())


def test_a_checkpoint_whose_fsync_fails_is_a_panic_and_the_log_restores_the_table(
    failing: tuple[Disk, Ground], data_path: str
) -> None:
    disk, layers = failing
    overlay = layers.overlay(options=data_path)
    with cluster(overlay.path / "pg", "autovacuum = off\nbgwriter_lru_maxpages = 0\n") as database:
        fill_table(database, disk)
        disk.fail("data")
        assert panicked(database)
        disk.heal()
        database.start()
        assert whole(database, disk)
        database.sql("checkpoint")
        database.stop()


def test_pages_lost_before_the_checkpoint_are_a_panic_though_the_disk_is_well_again(
    failing: tuple[Disk, Ground], data_path: str
) -> None:
    disk, layers = failing
    overlay = layers.overlay(options=data_path)
    # A cache this small has to let go of the table's pages: they are written to the file, and wait in the kernel.
    with cluster(
        overlay.path / "pg", "autovacuum = off\nbgwriter_lru_maxpages = 0\nshared_buffers = 128kB\n"
    ) as database:
        fill_table(database, disk)
        database.sql("select count(*) from pg_class, pg_attribute")
        before = disk.counters().failed_writes
        disk.fail("data")
        disk.push()
        disk.heal()
        assert disk.counters().failed_writes > before
        assert panicked(database)
        database.start()
        assert whole(database, disk)
        database.stop()
