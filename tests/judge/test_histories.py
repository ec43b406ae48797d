"""Counterexamples of the model, as scenarios."""

import json
from pathlib import Path
from typing import Any

import pytest

from overt.judge import histories


def event(who: str, what: str, fd: int = 0, errno: int = 0) -> dict[str, Any]:
    return {"who": who, "what": what, "fd": fd, "errno": errno}


A, B = "container A (ordinary)", "container B (volatile)"


def file(tmp_path: Path, due: str, *events: dict[str, Any], **more: Any) -> Path:
    verdict = {"design": "mainline", "use_case": "U5", "must": True, "outcome": "unsolved", "due": due, **more}
    path = tmp_path / "prove.json"
    path.write_text(json.dumps({"verdicts": [{**verdict, "history": list(events)}, {"design": "x", "use_case": "U1"}]}))
    return path


def test_a_counterexample_is_a_scenario_that_ends_with_what_is_due(tmp_path: Path) -> None:
    path = file(tmp_path, "an error is due", event(A, "mount"), event("host", "lose"), event(A, "open", 1),
                event(A, "syncfs", 1))  # fmt: skip
    (found,), left_out = histories.read(path)
    assert (found.id, found.need, found.mounts, found.containers, left_out) == (
        "U5-mainline", "must", ("ordinary",), 1, [],
    )  # fmt: skip
    assert [f"{step.who}: {step.call}" for step in found.steps] == [
        "A: mount", "host: own = open lost1 rw create", "host: write own doomed", "host: close own", "disk: fail data",
        "disk: push", "disk: heal", "A: f1 = open file r", "A: syncfs f1",
    ]  # fmt: skip
    assert found.steps[-1].due == ("told",)
    assert found.has_fault


def test_a_mount_that_is_due_has_to_go_well(tmp_path: Path) -> None:
    (found,), _ = histories.read(file(tmp_path, "a mount is due", event("host", "lose"), event(B, "mount", errno=5)))
    assert (found.mounts, found.steps[-1].due) == (("volatile",), ("0",))


def test_mounts_of_both_kinds_are_left_out_aloud(tmp_path: Path) -> None:
    found, left_out = histories.read(file(tmp_path, "an error is due", event(A, "mount"), event(B, "mount")))
    assert (found, left_out) == ([], ["U5-mainline: mounts of both kinds, or none"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", ""), ("{}", "it has no verdicts"), ("no json", ""), ('{"verdicts": ["abc"]}', ""),
        ('{"verdicts": [{"history": [{"who": 1}]}]}', "it has no use_case"),
    ],
)  # fmt: skip
def test_what_is_no_such_file_is_refused_with_its_name(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"other\.json: not the output of overt prove --json: {why}"):
        histories.read(path)
