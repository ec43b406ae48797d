"""The matrix of the thread, its exact sizes, and what is made of it; all of it is checked once for the tests here."""

import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from overt.cli.main import run
from overt.prove import document, matrix, report, timeline
from overt.prove.claims import CLAIMS
from overt.prove.designs import DESIGNS
from overt.prove.matrix import NOT_APPLICABLE, SOLVED, UNKNOWN, UNSOLVED, Finding, Verdict
from overt.prove.scope import DEFAULT

DOCS = Path(__file__).resolve().parents[2] / "docs"
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    from overt.cli.prove import gather

    found, stopped = gather(list(matrix.tasks(list(DESIGNS), DEFAULT)), os.cpu_count() or 1, None)
    assert not stopped
    return found


@pytest.fixture(scope="module")
def verdicts(findings: list[Finding]) -> dict[str, list[Verdict]]:
    return {name: matrix.verdicts(name, findings) for name in DESIGNS}


UNSOLVED_BY = {
    "linux-5.10": {4, 5, 6, 8, 10, 11, 12, 13, 15, 16, 18, 19, 21, 22, 24, 25},
    "layton": {4, 5, 6, 8, 11, 12, 13, 15, 16, 18, 19, 21, 22, 24, 25},
    "check_error": {4, 5, 9, 10, 11, 12, 13, 15, 16, 18, 19, 21, 22, 24, 25},
    "goldstein": {15, 19, 21, 22, 24, 25},
    "sticky": {5, 6, 8, 9, 11, 12, 13, 15, 19, 21, 22, 24, 25},
    "mainline": {5, 6, 8, 9, 11, 12, 13, 15, 19, 21, 22, 24, 25},
    "overt": {21, 22, 23},
    "overt-untraced": {10, 21, 22, 23},
    "guard": {9, 15, 21, 22, 24},
}


@pytest.mark.parametrize("design", DESIGNS)
def test_each_design_leaves_these_use_cases_unsolved(design: str, verdicts: dict[str, list[Verdict]]) -> None:
    mine = verdicts[design]
    assert {verdict.use_case for verdict in mine if verdict.outcome == UNSOLVED} == UNSOLVED_BY[design]
    assert not [verdict for verdict in mine if verdict.outcome == UNKNOWN]
    assert {verdict.use_case for verdict in mine if verdict.outcome == NOT_APPLICABLE} == (
        set() if DESIGNS[design].served else {23}
    )


def test_overt_breaks_no_must(verdicts: dict[str, list[Verdict]]) -> None:
    for design in ("overt", "overt-untraced", "guard"):
        musts = [verdict for verdict in verdicts[design] if CLAIMS[verdict.use_case].must]
        assert {verdict.outcome for verdict in musts} == {SOLVED}


SIZES = {
    "linux-5.10": 517_340,
    "layton": 1_213_363,
    "check_error": 1_573_784,
    "goldstein": 2_217_672,
    "sticky": 780_964,
    "mainline": 644_016,
    "overt": 1_931_975,
    "overt-untraced": 2_035_389,
    "guard": 1_504_774,
}


def test_every_state_there_is_was_visited_and_they_are_as_many_as_ever(findings: list[Finding]) -> None:
    assert all(finding.complete for finding in findings)
    states = {name: sum(one.states for one in findings if one.task.design == name) for name in DESIGNS}
    assert states == SIZES


def test_the_shortest_history_to_u5_on_mainline_is_the_mails(verdicts: dict[str, list[Verdict]]) -> None:
    (verdict,) = [verdict for verdict in verdicts["mainline"] if verdict.use_case == 5]
    assert verdict.history is not None
    assert timeline.lines(verdict.history) == [
        "container A (ordinary)  - mount",
        "host                    - a write is lost: 1 writeback error recorded in upper sb",
        "container A (ordinary)  - open fd 1",
        "                        - syncfs(fd 1) = 0    <-- an error is due",
    ]


def test_the_page_and_its_pictures_are_current(findings: list[Finding], verdicts: dict[str, list[Verdict]]) -> None:
    """`tools/use-cases` makes them."""
    files = document.pages([verdict for mine in verdicts.values() for verdict in mine], findings, DEFAULT)
    for path, text in files.items():
        assert (DOCS / path).read_text() == text, path
    assert {f"{document.PICTURES}/{path.name}" for path in (DOCS / document.PICTURES).iterdir()} == set(files) - {
        document.PAGE
    }


def test_pictures_are_well_formed_and_say_what_was_answered() -> None:
    text = (DOCS / document.PICTURES / "mainline-U5.svg").read_text()
    ElementTree.fromstring(text)
    assert "syncfs(fd 1) = 0" in text
    assert "prefers-color-scheme:dark" in text


def test_json_has_the_verdict_and_the_history(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prove", "mainline", "U5", "--json", "--bound", "1/1/1", "--jobs", "1"]) == 0
    (verdict,) = json.loads(capsys.readouterr().out)["verdicts"]
    assert (verdict["outcome"], verdict["must"], verdict["history"][-1]["errno"]) == ("unsolved", True, 0)


def test_a_use_case_is_told_as_a_story(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prove", "check_error", "5", "--bound", "2/1/1", "--jobs", "1"]) == 0
    text = capsys.readouterr().out
    assert "Vivek Goyal's v3" in text
    assert text.rstrip().endswith("<-- an error is due")


def test_what_was_not_visited_is_not_called_solved(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prove", "overt", "U5", "--states", "1", "--jobs", "1"]) == 0
    assert "unknown: no violation in the first" in capsys.readouterr().out


def test_what_a_small_world_has_not_is_not_called_unsolved(capsys: pytest.CaptureFixture[str]) -> None:
    """U8 is about two errors, U12 about two containers, U15 about two descriptors."""
    assert run(["prove", "overt", "--json", "--bound", "1/1/1", "--jobs", "1"]) == 0
    found = {verdict["use_case"]: verdict for verdict in json.loads(capsys.readouterr().out)["verdicts"]}
    for case in ("U8", "U12", "U15"):
        verdict = found[case]
        assert (verdict["outcome"], verdict["reason"]) == ("unknown", "it does not come up within this bound")
    assert {case for case, verdict in found.items() if verdict["outcome"] == "unsolved"} == {"U21", "U22", "U23"}


def test_what_was_stopped_is_not_all_there_is(findings: list[Finding]) -> None:
    assert "9 runs of 10, not all there are;" in report.totals(findings[:9], DEFAULT, 10)[0]
    assert "9 runs, all there are;" in report.totals(findings[:9], DEFAULT, 9)[0]


@pytest.mark.parametrize("words", [["prove", "nobody"], ["prove", "overt", "U26"], ["prove", "--bound", "5/1/1"]])
def test_bad_usage_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
