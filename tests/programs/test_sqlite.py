"""SQLite: three processes write one database, in each kind of journal; a write-ahead log is shared by a mapping."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from .ground import Failed, Ground, kill_group, prefix, run

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

WRITERS, ROUNDS = 3, 40

WRITER = """
import sqlite3, sys
path, number, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
base = sqlite3.connect(path, timeout=60, isolation_level=None)
for round in range(rounds):
    base.execute("begin immediate")
    base.execute("update account set amount = amount - 1 where id = ?", (number,))
    base.execute("update account set amount = amount + 1 where id = ?", ((number + round) % 100,))
    base.executemany("insert into entry values (?, ?, randomblob(?))", [(number, round, 50 * row) for row in range(10)])
    if round % 7 == 3:
        base.execute("delete from entry where writer = ? and round < ?", (number, round - 20))
    base.execute("rollback" if round % 5 == 4 else "commit")
"""


def fill(path: Path, journal: str) -> None:
    with closing(sqlite3.connect(path)) as base:
        assert base.execute(f"pragma journal_mode={journal}").fetchone() == (journal,)
        base.execute("create table account (id integer primary key, amount integer)")
        base.execute("create table entry (writer integer, round integer, data blob)")
        base.execute("create index by_writer on entry (writer, round)")
        base.executemany("insert into account values (?, 100)", [(number,) for number in range(100)])
        base.commit()


@pytest.mark.parametrize("journal", ["wal", "delete", "truncate", "persist"])
def test_a_database_of_the_lower_layer_is_written_by_three_at_once(
    layers: Ground, data_path: str, journal: str
) -> None:
    lower = layers.directory / "lower"
    lower.mkdir()
    fill(lower / "base", journal)
    overlay = layers.overlay(lower, data_path)
    base = overlay.path / "base"
    running = []
    try:
        for number in range(WRITERS):
            command = [*prefix(None), sys.executable, "-I", "-c", WRITER, str(base), str(number), str(ROUNDS)]
            running.append(subprocess.Popen(command, start_new_session=True))
        if any(process.wait(90) for process in running):
            raise Failed("a writer failed")
    finally:
        for process in running:
            kill_group(process)
    with closing(sqlite3.connect(base)) as reader:
        assert reader.execute("pragma integrity_check").fetchall() == [("ok",)]
        assert reader.execute("select sum(amount) from account").fetchone() == (10_000,)
        assert reader.execute("select max(round) from entry group by writer").fetchall() == [(ROUNDS - 2,)] * WRITERS
        assert reader.execute(f"pragma journal_mode={journal}").fetchone() == (journal,)
    assert run("sqlite3", base, "vacuum; pragma integrity_check; select count(*) from account;").split() == [
        "ok",
        "100",
    ]
    with closing(sqlite3.connect(f"file:{lower / 'base'}?immutable=1", uri=True)) as below:
        assert below.execute("select count(*), sum(amount) from account").fetchone() == (100, 10_000)
        assert below.execute("select count(*) from entry").fetchone() == (0,)
