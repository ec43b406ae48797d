"""What the eyes see, on disks that really fail, and what they leave to the host."""

import errno
import os
import time
from pathlib import Path

import pytest

from overt.host import files
from overt.upper import Upper, Uppers

from .stage import BLOCK, Stage, errnos, flush, told

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]

EIO = errno.EIO


def test_an_error_is_seen_by_check_and_the_host_is_still_told(stage: Stage) -> None:
    upper, account = stage.attach(volatile=True)
    assert upper.eyes == "probes+trace"
    upper.check()
    assert account.sticky() == 0
    stage.lose("victim")
    upper.check()
    assert (account.sticky(), errnos(upper)) == (EIO, [EIO])
    assert (stage.host(), stage.host()) == (EIO, 0)
    assert upper.taken == 0


def test_an_error_is_seen_by_flush_and_the_host_is_still_told(stage: Stage) -> None:
    upper, account = stage.attach()
    stage.write("victim")
    stage.disk.fail("data")
    assert flush(upper) is None  # the flush went through; what it met is in the ledger
    assert account.owed() == upper.ledger.errors[0]
    assert (stage.host(), stage.host()) == (EIO, 0)
    assert upper.taken == 0


def test_with_the_probes_switched_off_the_host_is_robbed(ext4: Stage, no_probes: None) -> None:
    ext4.uppers = Uppers(ext4.hear, trace=False)
    upper, _ = ext4.attach()
    assert upper.eyes == "cursor"
    assert "switched off" in upper.refused
    ext4.lose("victim")
    assert flush(upper) is None
    assert [(error.errno, error.source, error.taken) for error in ext4.heard] == [(EIO, "cursor", True)]
    assert (ext4.host(), upper.taken) == (0, 1)


def test_an_error_is_recorded_once_however_often_one_looks(stage: Stage) -> None:
    upper, _ = stage.attach()
    stage.lose("victim", pages=20)
    for _ in range(3):
        upper.check()
        assert flush(upper) is None
    assert errnos(upper) == [EIO]
    assert stage.heard == upper.ledger.errors


def test_a_second_error_is_told_from_the_first_while_the_host_has_seen_neither(stage: Stage) -> None:
    upper, _ = stage.attach()
    stage.lose("first")
    upper.check()
    upper.check()
    stage.lose("second")
    upper.check()
    assert [error.source for error in upper.ledger.errors] == ["probe", "trace"]
    stage.lose("third")
    assert flush(upper) is None
    upper.check()
    assert len(upper.ledger.errors) == 3
    assert (stage.host(), stage.host(), upper.taken) == (EIO, 0, 0)


def test_without_the_tracepoint_a_second_error_is_seen_but_the_first_is_taken_aloud(stage: Stage) -> None:
    stage.uppers = Uppers(stage.hear, trace=False)
    upper, _ = stage.attach()
    assert upper.eyes == "probes"
    stage.lose("first")
    assert flush(upper) is None
    assert stage.host() == 0
    stage.lose("second")
    assert flush(upper) is None
    assert [(error.errno, error.source, error.taken) for error in stage.heard] == [(EIO, "probe", True)] * 2
    assert (upper.taken, upper.eyes) == (2, "probes")
    stage.lose("third")
    upper.check()
    assert stage.host() == EIO  # check takes nothing: it never flushes
    assert not stage.heard[-1].taken
    assert flush(upper) is None
    assert [error.number for error in stage.heard] == [1, 2, 3, 3]  # and said again, once it was
    assert (stage.heard[-1].taken, upper.ledger.errors[-1].taken) == (True, True)


def test_an_error_that_the_host_was_told_of_first_is_seen_all_the_same(stage: Stage) -> None:
    upper, _ = stage.attach()
    for number in (1, 2):
        stage.lose(f"victim-{number}")
        assert stage.host() == EIO
        upper.check()
        assert len(upper.ledger.errors) == number


@pytest.mark.parametrize("trace", [True, False])
def test_an_error_from_before_is_said_aloud_and_told_to_nobody(stage: Stage, trace: bool) -> None:
    stage.uppers = Uppers(stage.hear, trace=trace)
    stage.lose("old")
    upper, volatile = stage.attach(volatile=True)
    _, ordinary = stage.attach()
    assert [(error.errno, error.source, error.taken) for error in stage.heard] == [(EIO, "standing", not trace)]
    assert flush(upper) is None
    upper.check()
    assert (volatile.sticky(), ordinary.owed(), len(upper.ledger.errors)) == (0, None, 1)
    stage.lose("new")
    upper.check()
    assert (volatile.sticky(), ordinary.owed()) == (EIO, upper.ledger.errors[1])
    assert stage.host() == EIO
    assert upper.taken == (not trace)


@pytest.mark.parametrize("trace", [True, False])
def test_an_error_that_nobody_looked_at_yet_is_not_told_to_a_later_overlay(stage: Stage, trace: bool) -> None:
    stage.uppers = Uppers(stage.hear, trace=trace)
    upper, early = stage.attach()
    stage.lose("first")
    _, late = stage.attach()
    assert (early.owed(), late.owed()) == (upper.ledger.errors[0], None)
    stage.lose("second")
    upper.check()
    assert late.errors() == upper.ledger.errors[1:]
    assert len(upper.ledger.errors) == 2


@pytest.mark.parametrize("trace", [True, False])
def test_without_probes_the_other_eyes_tell_the_same(ext4: Stage, no_probes: None, trace: bool) -> None:
    ext4.uppers = Uppers(ext4.hear, trace=trace)
    ext4.lose("old")
    upper, first = ext4.attach()
    assert upper.eyes == ("trace" if trace else "cursor")
    assert [error.source for error in ext4.heard] == ["standing"]
    ext4.lose("one")
    upper.check()
    assert (first.owed() is not None) == trace  # rule 8 cannot be kept with the cursor alone: it has to flush
    assert flush(upper) is None
    assert len(first.errors()) == 1
    _, second = ext4.attach()
    ext4.lose("two")
    for _ in range(2):
        assert flush(upper) is None
    assert (len(first.errors()), len(second.errors())) == (2, 1)
    assert ext4.host() == 0
    assert upper.taken == 3


def test_check_and_a_volatile_mount_write_nothing_and_flush_nothing(stage: Stage) -> None:
    upper, _ = stage.attach(volatile=True)
    stage.host()
    stage.write("dirty", pages=100)
    before = stage.disk.counters()
    for _ in range(1000):
        upper.check()
    assert stage.disk.counters() == before
    stage.attach(volatile=True)
    assert stage.disk.counters().flushes == before.flushes
    assert stage.disk.marker not in stage.disk.snapshot()


def test_check_after_an_error_flushes_nothing_either(stage: Stage) -> None:
    upper, account = stage.attach(volatile=True)
    stage.lose("victim")
    stage.write("dirty", pages=100)
    before = stage.disk.counters()
    for _ in range(100):
        upper.check()
    assert account.sticky() == EIO
    assert stage.disk.counters().flushes == before.flushes
    assert stage.disk.marker not in stage.disk.snapshot()


def named(upper: Upper, since: int) -> set[int] | None:
    failed = upper.failed(since)
    now = time.monotonic()
    assert all(now - 60 < each.when <= now for each in (failed or {}).values())
    return None if failed is None else set(failed)


def test_the_files_that_failed_are_named_and_no_other(stage: Stage) -> None:
    upper, _ = stage.attach()
    stage.write("bystander")
    assert flush(upper) is None
    first = stage.lose("first", pages=3, stride=64 * BLOCK)
    upper.check()
    second = stage.lose("second")
    upper.check()
    assert [named(upper, since) for since in range(3)] == [{first, second}, {second}, set()]
    assert stage.lose("first") == first
    upper.check()
    assert [named(upper, since) for since in range(4)] == [{first, second}, {first, second}, {first}, set()]


def test_which_files_failed_is_not_guessed_without_the_tracepoint(ext4: Stage) -> None:
    ext4.uppers = Uppers(trace=False)
    upper, _ = ext4.attach()
    assert upper.failed(0) == {}
    ext4.lose("victim")
    upper.check()
    assert upper.failed(0) is None


@pytest.mark.parametrize("module", ["trace", "upper"])
def test_of_failed_files_without_end_the_latest_are_known(
    ext4: Stage, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """Whoever asks from farther back is not told less than the truth, but that it is not known."""
    monkeypatch.setattr(f"overt.upper.{module}.MOST_INODES", 3)
    upper, _ = ext4.attach()
    lost = []
    for round_ in range(5):
        lost.append(ext4.lose(f"victim-{round_}"))
        upper.check()
    assert [error.number for error in upper.ledger.errors] == [1, 2, 3, 4, 5]
    if module == "upper":
        assert [named(upper, since) for since in range(6)] == [None, None, {*lost[2:]}, {*lost[3:]}, {lost[4]}, set()]
        return
    for round_ in range(4):
        ext4.lose(f"together-{round_}")
    last = ext4.lose("last")
    upper.check()
    assert upper.failed(5) is None
    assert ext4.lose("last") == last
    upper.check()
    assert (named(upper, 5), named(upper, 6)) == (None, {last})


def test_lost_events_still_make_an_error_but_name_no_files(ext4: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overt.upper.trace._TOTAL_KIB", 8)
    upper, _ = ext4.attach()
    ext4.lose("first")
    upper.check()
    ext4.lose("second", pages=3000, stride=2 * BLOCK)
    upper.check()
    assert [error.source for error in upper.ledger.errors] == ["probe", "trace"]
    assert upper.failed(0) is None
    upper.check()
    assert len(upper.ledger.errors) == 2


def switch_off(upper: Upper, path: str) -> None:
    """As root may, and `trace-cmd reset -a` does, with every tracing instance."""
    trace = upper._uppers.trace
    assert trace is not None
    fd = os.open(f"{trace.name}/{path}", os.O_WRONLY, dir_fd=trace._instances)
    try:
        os.write(fd, b"0")
    finally:
        os.close(fd)


@pytest.mark.parametrize("path", ["tracing_on", "events/filemap/filemap_set_wb_err/enable", "events/enable"])
def test_tracing_that_somebody_has_switched_off_hides_no_error(ext4: Stage, path: str) -> None:
    upper, account = ext4.attach()
    ext4.lose("first")
    upper.check()
    switch_off(upper, path)
    ext4.lose("second")
    assert flush(upper) is None
    assert account.owed() == upper.ledger.errors[1]
    assert upper.failed(0) is None  # not known which files
    assert flush(upper) is None
    assert len(upper.ledger.errors) == 2
    last = ext4.lose("third")  # and it is on again
    upper.check()
    assert (len(upper.ledger.errors), named(upper, 2)) == (3, {last})


def test_tracing_switched_off_while_the_probe_is_armed_makes_no_error_and_names_no_files(ext4: Stage) -> None:
    upper, _ = ext4.attach()
    ext4.lose("seen")
    switch_off(upper, "tracing_on")
    ext4.lose("not seen")
    upper.check()
    assert (errnos(upper), upper.failed(0)) == ([EIO], None)
    upper.check()
    assert errnos(upper) == [EIO]


def test_another_filesystems_error_is_not_ours(ext4: Stage, btrfs: Stage) -> None:
    ext4.lose("standing")
    btrfs.lose("standing")
    uppers = ext4.uppers = btrfs.uppers
    one, _ = ext4.attach()
    other, _ = btrfs.attach()
    assert len(uppers.known) == 2
    btrfs.lose("victim")
    one.check()
    other.check()
    assert (errnos(one), errnos(other)) == ([EIO], [EIO, EIO])


def test_two_processes_see_the_same_error_and_the_host_too(ext4: Stage) -> None:
    uppers = ext4.uppers
    here, _ = ext4.attach()
    ext4.uppers = Uppers()
    try:
        there, _ = ext4.attach()
        ext4.lose("victim")
        here.check()
        there.check()
        assert errnos(here) == errnos(there) == [EIO]
        assert ext4.host() == EIO
    finally:
        ext4.uppers.close()
        ext4.uppers = uppers


def test_a_fresh_probe_stands_on_any_overlay_that_is_still_there(ext4: Stage) -> None:
    ext4.uppers = Uppers(trace=False)
    upper, _ = ext4.attach("gone")
    ext4.attach("there")
    for part in ("upper", "work"):
        os.rmdir(ext4.root / "gone" / part)
    for number in (1, 2):
        ext4.lose(f"victim-{number}")
        assert flush(upper) is None
    assert (errnos(upper), upper.eyes) == ([EIO, EIO], "probes")


def test_where_no_fresh_probe_can_be_mounted_the_cursor_goes_on(ext4: Stage) -> None:
    ext4.uppers = Uppers(trace=False)
    upper, _ = ext4.attach("gone")
    for part in ("upper", "work"):
        os.rmdir(ext4.root / "gone" / part)
    for number in (1, 2):
        ext4.lose(f"victim-{number}")
        assert flush(upper) is None
        assert upper.eyes == "cursor"
    assert errnos(upper) == [EIO, EIO]


def test_a_descriptor_of_the_upper_held_by_the_host_is_told_too(ext4: Stage, tmp_path: Path) -> None:
    held = os.open(ext4.root, os.O_RDONLY)
    try:
        upper, _ = ext4.attach()
        ext4.lose("victim")
        assert flush(upper) is None
        assert told(lambda: files.syncfs(held)) == EIO
        assert told(lambda: files.syncfs(held)) == 0
    finally:
        os.close(held)
