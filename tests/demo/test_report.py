"""What the demo concludes from its rows. Pure."""

import pytest

from overt.demo import report
from overt.demo.scenario import Row

N = 1000


def kept(mount: str) -> Row:
    return Row("overt", mount, N, **report.promise(mount, N))


KERNEL = Row("kernel overlayfs", "ordinary", N, (0, 0), (0, 0), (0, 0), (1, 0))


def test_a_promise_kept_is_status_0_whatever_the_others_do() -> None:
    absent = Row("fuse-overlayfs", "ordinary", N, outcome="missing", note="not installed")
    assert report.status([KERNEL, absent, kept("ordinary"), kept("volatile")]) == 0


@pytest.mark.parametrize(
    "row",
    [
        kept("ordinary")._replace(new_fd=(N - 1, 0)),
        kept("ordinary")._replace(old_fd=(N, 1)),
        kept("ordinary")._replace(fsync=(1, 0)),
        kept("ordinary")._replace(victim_fsync=(0, 0)),
        kept("volatile")._replace(fsync=(N, N - 1)),
        kept("volatile")._replace(note="some were answered ENOTCONN"),
        Row("overt", "volatile", N, outcome="failed", note="failed: no answer"),
    ],
)
def test_one_container_not_told_as_promised_is_status_1(row: Row) -> None:
    assert report.status([KERNEL, kept("ordinary"), row]) == report.BROKEN
    assert "did not keep its promise" in report.sentences([KERNEL, kept("ordinary"), row])[-1]


def test_the_guard_has_a_promise_to_keep_as_well() -> None:
    guard = kept("ordinary")._replace(system="overt guard")
    rows = [KERNEL, kept("ordinary"), kept("volatile"), guard]
    assert report.status(rows) == 0
    assert report.sentences(rows)[-1].endswith("So did the guard, on the kernel's own overlayfs.")
    rows[-1] = guard._replace(old_fd=(0, 0))
    assert report.status(rows) == report.BROKEN
    assert "overt guard, old_fd: told 0 and 0" in report.sentences(rows)[-1]
    rows[-1] = Row("overt guard", "ordinary", N, outcome="missing", note="not without root")
    assert report.status(rows) == 0


def test_a_broken_promise_outweighs_a_void_row() -> None:
    void = KERNEL._replace(outcome="void", new_fd=None)
    assert report.status([void, kept("ordinary")._replace(new_fd=(0, 0))]) == report.BROKEN
    assert report.status([void, kept("ordinary")]) == report.VOID


def test_nothing_is_concluded_where_overt_was_not_asked() -> None:
    absent = Row("overt", "ordinary", N, outcome="missing", note="not without /dev/fuse")
    assert report.status([KERNEL, absent]) == report.REHEARSED
    assert report.sentences([KERNEL, absent])[-1] == "Whether overt keeps its promise was not shown."
    assert report.status([]) == report.REHEARSED


def test_where_the_kernel_sends_no_syncfs_no_promise_is_broken_and_none_shown() -> None:
    blind = Row("overt", "ordinary", N, outcome="blind", note="this kernel does not send syncfs to FUSE")
    rows = [KERNEL, blind, blind._replace(mount="volatile")]
    assert report.status(rows) == report.BLIND
    assert report.sentences(rows)[-1] == (
        "Whether overt keeps its promise cannot be shown here: this kernel does not send syncfs to FUSE."
    )
    assert report.status([*rows, KERNEL._replace(outcome="void")]) == report.VOID
    guard = kept("ordinary")._replace(system="overt guard", new_fd=(0, 0))
    assert report.status([*rows, guard]) == report.BROKEN


def test_there_are_three_sentences_and_the_numbers_are_the_tables() -> None:
    happened, others, verdict = report.sentences([KERNEL, kept("ordinary"), kept("volatile")])
    assert "lost" in happened
    assert "1000 containers" in others and "kernel overlayfs told 0 on ordinary mounts" in others
    assert verdict.startswith("overt told every container")


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    full = KERNEL._replace(mount_seconds=12.34, server_rss_bytes=210 << 20)
    report.show([full, kept("ordinary"), kept("volatile")], "ext4")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert f"kernel overlayfs│ordinary│{'│'.join(['   0    0'] * 3)}│      1 0│12.3 s│210 MiB" in lines
