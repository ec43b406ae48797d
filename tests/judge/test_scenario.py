"""Scenarios as data: what a file may say, and that every use case has one."""

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from overt.judge import choice, expected, scenario, systems, table
from overt.judge.cells import Cell, cells, merge
from overt.judge.columns import SYSTEMS
from overt.judge.party import Calls
from overt.judge.play import FLAKY, HOLDS, NOT_APPLICABLE, UNKNOWN, VIOLATED, Call, Outcome
from overt.judge.scenario import Step
from overt.judge.stage import Stage
from overt.judge.systems import Command, Layers, Refused, from_command

TEXT = """
title = "a title"
need = "must"
mounts = ["ordinary"]
claim = "a claim"
steps = ["A: mount", "A: f = open file rw", "A: fsync f -> 0"]
"""


def test_every_use_case_has_a_scenario() -> None:
    cases = {one.case for one in scenario.built_in()}
    assert cases >= {f"U{number}" for number in range(1, 26)}


def test_scenarios_come_in_the_order_of_their_numbers() -> None:
    cases = [one.case for one in scenario.built_in()]
    numbers = [int(case[1:]) for case in cases if case[0] == "U"]
    assert numbers == sorted(numbers)
    assert cases[0] == "U1" and cases[-1][0] == "X"


@pytest.mark.parametrize("one", scenario.built_in(), ids=lambda one: one.id)
def test_every_step_of_the_package_has_a_verb_and_its_descriptors_are_open(one: scenario.Scenario) -> None:
    verbs = {"mount", "umount", "kill", "restart", "commit"}
    fds: set[tuple[str, str]] = set()
    for step in one.steps:
        if step.who == "disk":
            assert hasattr(Stage, f"disk_{step.verb}"), step
            continue
        assert step.verb in verbs or hasattr(Calls, step.verb), step
        if step.name:
            fds |= {(who, step.name) for who in (one.letters if step.who == "each" else (step.who,))}
        if step.verb in ("fsync", "syncfs", "fdatasync", "write", "close", "read", "map", "forget"):
            assert step.who == "each" or (step.who, step.words[0]) in fds, step


def test_nothing_in_a_scenario_names_a_system() -> None:
    """In its notes it may."""
    names = {"overt", "kernel", "fuse", "mergerfs", "unionfs", "plain"}
    for one in scenario.built_in():
        words = {word for step in one.steps for word in (step.verb, *step.words, *step.due)}
        assert not words & names, one.id


def test_a_step_is_parsed() -> None:
    assert Step.parse("A: f = open lost rw create") == Step("A", "f", "open", ("lost", "rw", "create"), ())
    assert Step.parse("each: syncfs s -> told|0") == Step("each", "", "syncfs", ("s",), ("told", "0"))
    assert Step.parse("disk: push") == Step("disk", "", "push", (), ())


@pytest.mark.parametrize(
    ("due", "answer", "fits"),
    [
        ("told", "EIO", True), ("told", "ENOSPC", True), ("told", "EBADF", False), ("told", "0", False),
        ("0|told", "0", True), ("error", "EBADF", True), ("error", "0", False), ("error", "refused", False),
        ("EBADF", "EIO", False),
    ],
)  # fmt: skip
def test_what_fits_what_is_due(due: str, answer: str, fits: bool) -> None:
    assert Step.parse(f"A: fsync f -> {due}").fits(answer) is fits


def test_a_premise_fits_only_0() -> None:
    assert Step.parse("A: fsync f").fits("0")
    assert not Step.parse("A: fsync f").fits("EIO")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("A: mount", "A mount"), "not a step"),
        (("must", "should"), "need is one of must, nice"),
        (('"ordinary"', '"strange"'), "mounts are some of"),
        (("A: fsync", "Z: fsync"), "who is 'Z'"),
        ((" -> 0", ""), "no step says what is due"),
        (("claim =", "claims ="), "it has no claim"),
        (('title = "a title"', 'title = "a title"\nwhatever = 1'), "there is no whatever in a scenario"),
        (('title = "a title"', 'title = "a title"\nid = "x"'), "there is no id in a scenario"),
        (('title = "a title"', "title = 5"), "title is not a text"),
        (('mounts = ["ordinary"]', 'mounts = ["ordinary"]\ncontainers = "x"'), "containers is not a number"),
        (('mounts = ["ordinary"]', 'mounts = ["ordinary"]\ncontainers = true'), "containers is not a number"),
        (('mounts = ["ordinary"]', 'mounts = ["ordinary"]\ncontainers = 0'), "containers are 1 to "),
        (('mounts = ["ordinary"]', f'mounts = ["ordinary"]\ncontainers = {1 << 60}'), "containers are 1 to "),
        (('title = "a title"', f"title = {'[' * 9999}"), "recursion"),
        (('mounts = ["ordinary"]', 'mounts = ["ordinary"]\nsize = "big"'), "size is not a number"),
        (('mounts = ["ordinary"]', f'mounts = ["ordinary"]\nsize = {1 << 50}'), "size is in bytes"),
        (('mounts = ["ordinary"]', 'mounts = ["ordinary"]\nlayers = "yes"'), "layers is not true or false"),
        (('mounts = ["ordinary"]', 'mounts = [["ordinary"]]'), "mounts is not a list of texts"),
        (('mounts = ["ordinary"]', 'mounts = ["ordinary"]\nuppers = "ext4"'), "uppers is not a list of texts"),
        (('mounts = ["ordinary"]', 'mounts = ["ordinary"]\nuppers = ["nosuch"]'), "uppers are some of ext4, "),
        (('"A: mount", ', "1, "), "steps is not a list of texts"),
        (("A: fsync f", "A: fsink f"), "A has no verb 'fsink'"),
        (("A: fsync f", "host: umount"), "host has no verb 'umount'"),
        (("A: fsync f", "disk: fsync f"), "disk has no verb 'fsync'"),
        (("A: fsync f", "A: _fds"), "A has no verb '_fds'"),
        (("A: fsync f", "disk: push harder"), "too many positional arguments"),
        (("A: fsync f", "A: write f"), "missing a required argument: 'what'"),
        (("A: fsync f", "A: write f doom"), "there is no 'doom': there are doomed, "),
        (("A: fsync f", "A: write f safe many"), "'many' is not a number"),
        (("A: fsync f", "disk: fail everything"), "there is no 'everything': there are all, data"),
        (("A: fsync f", "disk: fail data EWHAT"), "there is no 'EWHAT'"),
        (("A: fsync f", "disk: replay 0"), "0 points are none"),
        (("A: fsync f", "A: commit 0 syncfs"), "0 rounds are none"),
        (("A: fsync f", "A: read_only plaec"), "there is no 'plaec': there are place, superblock"),
        (("A: fsync f", "A: newly sync_fs ."), "there is no 'sync_fs'"),
        (("file rw", "file rx"), "there is no 'rx'"),
        ((" -> 0", " -> tld"), "nothing answers 'tld'"),
    ],
)
def test_a_file_that_is_no_scenario_is_refused_with_its_name_and_why(change: tuple[str, str], words: str) -> None:
    assert scenario.read(Path("U1-own.toml"), TEXT).id == "U1-own"
    with pytest.raises(ValueError, match=rf"^own\.toml: .*{words}"):
        scenario.read(Path("own.toml"), TEXT.replace(*change))


def test_only_scenarios_that_scale_get_more_containers() -> None:
    chosen = choice.choose([], ["u5", "U6"], 1000)  # as `overt prove` takes them
    assert [(one.case, one.containers) for one in chosen] == [("U5", 1000), ("U6", 3)]
    assert len(set(chosen[0].letters)) == 1000


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no scenario 'U99'"):
        choice.choose([], ["U99"], None)
    with pytest.raises(ValueError, match="no system 'nothing'"):
        choice.choose_systems(["nothing"], [], [])
    for line in ("some-overlay /mnt", "some-overlay {upperdir} {mount}"):
        with pytest.raises(ValueError, match=r"\{mount\}|\{lower\}"):
            from_command(line, "ordinary")


def test_systems_of_one_program_are_told_apart() -> None:
    lines = ["mount -o a {mount}", "/usr/bin/mount -o b {mount}", "other {mount}", "mount -o c {mount}"]
    given = choice.choose_systems(["plain"], lines, ["mount -o volatile {mount}"])[1:]
    assert [system.name for system in given] == [
        "mount (given)", "mount (given 2)", "other (given)", "mount (given 3)", "mount volatile (given)",
    ]  # fmt: skip


def test_two_scenarios_of_one_name_are_refused(tmp_path: Path) -> None:
    files = [tmp_path / "one/mine.toml", tmp_path / "two/mine.toml"]
    for file in files:
        file.parent.mkdir()
        file.write_text(TEXT, encoding="utf-8")
    with pytest.raises(ValueError, match="there are 2 scenarios 'mine'"):
        choice.choose(files, [], None)


def test_system_names_are_unique() -> None:
    names = [system.name for system in SYSTEMS]
    assert len(set(names)) == len(names)


def outcome(verdict: str, reason: str = "", *, scenario: str = "U5-new-fd", system: str = "kernel") -> Outcome:
    return Outcome(scenario, system, "ext4", verdict, reason)


def test_runs_that_differ_are_flaky_and_never_rounded() -> None:
    runs = [outcome(HOLDS), outcome(HOLDS), outcome(VIOLATED, "why")]
    merged = merge(runs)
    assert (merged.verdict, merged.runs) == (FLAKY, (HOLDS, HOLDS, VIOLATED))
    assert merged.reason == "holds 2, violated 1 of 3; why"
    assert merge([outcome(VIOLATED)] * 3).verdict == VIOLATED


def test_a_cell_that_is_not_as_expected_is_a_difference() -> None:
    known = {"ext4": {"kernel": {"violated": ["U5-new-fd"]}}}
    assert differences([outcome(VIOLATED), outcome(HOLDS, scenario="U1-fsync")], known) == []
    assert differences([outcome(HOLDS)], known) == ["U5-new-fd, kernel on ext4: holds, expected violated"]
    assert differences([outcome(FLAKY, scenario="U1-fsync")], known) != []
    missing = outcome(UNKNOWN, "mergerfs is not installed")
    assert differences([missing], known) == []
    assert differences([outcome(UNKNOWN, "something else")], known) != []


def test_a_cell_that_is_not_applicable_is_a_difference_unless_that_was_clear_or_is_listed() -> None:
    apart, killed = outcome(NOT_APPLICABLE, scenario="U4-volatile"), outcome(NOT_APPLICABLE, scenario="U23-server-dies")
    assert differences([apart], {"ext4": {"kernel": {}}}) == []
    assert differences([outcome(NOT_APPLICABLE)], {"ext4": {"kernel": {}}}) == [
        "U5-new-fd, kernel on ext4: not applicable, expected holds"
    ]
    assert len(differences([killed], {"ext4": {"kernel": {}}})) == 1
    assert differences([killed], {"ext4": {"kernel": {"not applicable": ["U23-server-dies"]}}}) == []


def test_what_a_run_has_found_is_expected_of_the_next() -> None:
    call = Call(0.0, "A", "kill", "0", "", True, "")
    found = [
        outcome(VIOLATED), outcome(UNKNOWN, scenario="U6-old-fds"), outcome(HOLDS, scenario="U1-fsync"),
        outcome(NOT_APPLICABLE, scenario="U4-volatile"),
        outcome(NOT_APPLICABLE, scenario="U23-server-dies")._replace(history=(call,)),
    ]  # fmt: skip
    text = expected.to_toml([one.as_json() for one in found], "6.18.1")
    assert tomllib.loads(text)["ext4"]["kernel"] == {
        "violated": ["U5-new-fd"], "unknown": ["U6-old-fds"], "not applicable": ["U23-server-dies"],
    }  # fmt: skip
    assert differences(found, tomllib.loads(text)) == []


def played() -> list[Cell]:
    return cells(scenario.built_in(), SYSTEMS, ["ext4"])


def differences(outcomes: list[Outcome], known: dict[str, Any]) -> list[str]:
    return expected.differences(outcomes, played(), known)


@pytest.mark.parametrize(
    ("runs", "status"),
    [
        ((HOLDS, UNKNOWN, HOLDS), table.UNSURE), ((HOLDS, VIOLATED, HOLDS), table.BROKEN),
        ((HOLDS, HOLDS, HOLDS), table.KEPT), ((UNKNOWN, VIOLATED), table.BROKEN), ((VIOLATED, VIOLATED), table.BROKEN),
        ((HOLDS, NOT_APPLICABLE), table.UNSURE),
    ],
)  # fmt: skip
def test_the_exit_status_says_broken_only_if_some_run_was(runs: tuple[str, ...], status: int) -> None:
    merged = merge([outcome(verdict, system="overt") for verdict in runs])
    assert table.status([merged], scenario.built_in()) == status


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_a_command_of_the_users_is_not_asked_for_its_version(tmp_path: Path) -> None:
    given = from_command(f"{script(tmp_path / 'mine', f'touch {tmp_path}/ran')} -o x {{mount}}", "ordinary")
    assert given.version() == f"{tmp_path}/mine -o x {{mount}}"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "version"),
    [("echo mine 1.5", "mine 1.5"), ("printf '\\3771.5\\n'", "\ufffd1.5"), ("exec sleep 50", "version unknown")],
)
def test_a_version_is_had_in_bounded_time_whatever_is_said(
    text: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And from where it was found."""
    monkeypatch.setattr(systems, "_VERSION", 0.5)
    monkeypatch.setattr(systems, "_PATH", f"{os.environ['PATH']}:{tmp_path}")
    script(tmp_path / "no-such-overlay", text)
    command = Command("mine", "ordinary", ["no-such-overlay", "{mount}"])
    assert command.missing() is None
    assert command.version() == version


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("exec sleep 50", "did not mount in 0.5 s"), ("echo waiting; exec sleep 50", "did not mount in 0.5 s: waiting"),
        ("exit 0", "did not mount in 0.5 s"), ("exit 7", "exit status 7"), ("echo no >&2; exit 7", "no"),
        ("printf '\\377'; exit 7", "\ufffd"),
    ],
)  # fmt: skip
def test_a_command_that_does_not_mount_says_why(
    text: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systems, "PATIENCE", 0.5)
    given = from_command(f"{script(tmp_path / 'mine', text)} {{mount}}", "ordinary")
    with given.serve(str(tmp_path)), pytest.raises(Refused) as refused:
        given.mount(Layers("/lower", "/upper", "/work"), str(tmp_path))
    assert str(refused.value) == why


def test_expectations_are_those_of_scenarios_and_systems_that_exist() -> None:
    known = expected.load()
    scenarios = {one.id for one in scenario.built_in()}
    systems = {system.name for system in SYSTEMS}
    for upper, rows in known.items():
        if upper != "kernel":
            assert set(rows) <= systems
            assert {name for row in rows.values() for names in row.values() for name in names} <= scenarios


def test_no_must_of_overts_is_expected_to_be_violated() -> None:
    musts = {one.id for one in scenario.built_in() if one.need == "must"}
    for upper, rows in expected.load().items():
        if upper == "kernel":
            continue
        for system, row in rows.items():
            if system.startswith("overt"):
                assert not musts & {*row.get("violated", ()), *row.get("unknown", ())}, (upper, system)
