"""Counterexamples of `overt prove --json` as scenarios: what breaks a design in the model is tried on real mounts.

Each history becomes one scenario, whose last step says what the use case wants. What the model calls by one word takes
some steps here: a lost write of the host's is a file of its own that the disk refuses. A history with mounts of both
kinds is left out, for a system has one; so is one with what no step can do.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from overt.judge.scenario import Scenario, Step

_DUE = {"a mount is due": "0", "0 is due": "0"}  # anything else that is due is an error
_FILE = "file"
_UNABLE = ("remount_rw", "msync", "copy_fails")


def read(path: Path) -> tuple[list[Scenario], list[str]]:
    """The scenarios of a file, and what was left out and why. Raises OSError; ValueError naming the file."""
    try:
        verdicts = json.loads(path.read_text("utf-8"))["verdicts"]
        found, left_out = [], []
        for verdict in verdicts:
            if not verdict.get("history"):
                continue
            name = f"{verdict['use_case']}-{verdict['design'].replace(' ', '_')}"
            kinds = {kind for event in verdict["history"] if (kind := _kind(event["who"]))}
            unable = [event["what"] for event in verdict["history"] if event["what"] in _UNABLE]
            if unable:
                left_out.append(f"{name}: no step does {unable[0]}")
            elif len(kinds) == 1:
                found.append(_scenario(name, verdict, kinds.pop()))
            else:
                left_out.append(f"{name}: mounts of both kinds, or none")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        why = f"it has no {error.args[0]}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: not the output of overt prove --json: {why}") from None
    return found, left_out


def _kind(who: str) -> str:
    found = re.fullmatch(r"container \w+ \((\w+)\)", who)
    return found[1] if found else ""


def _scenario(name: str, verdict: Mapping[str, Any], kind: str) -> Scenario:
    letters = sorted({event["who"].split()[1] for event in verdict["history"] if event["who"] != "host"})
    lines = [line for number, event in enumerate(verdict["history"]) for line in _steps(event, number)]
    steps = [Step.parse(line) for line in lines]
    due = _DUE.get(verdict["due"], "told")
    return Scenario(
        id=name,
        title=f"the model's counterexample to {verdict['use_case']} for the design {verdict['design']}",
        need="must" if verdict["must"] else "nice",
        mounts=(kind,),
        containers=len(letters),
        claim=f"In the model the design {verdict['design']} breaks {verdict['use_case']} here: {verdict['due']}.",
        steps=(*steps[:-1], steps[-1]._replace(due=(due,))),
        layers=True,
        witness="disk" if any(event["what"] == "abort" for event in verdict["history"]) else "cursor",
    )


def _steps(event: Mapping[str, Any], number: int) -> Iterator[str]:
    """What one event of the model is here. Answers on the way are what the design said: any will do."""
    who = "host" if event["who"] == "host" else event["who"].split()[1]
    fd = f"f{event['fd']}"
    match event["what"]:
        case "open":
            yield f"{who}: {fd} = open {'.' if who == 'host' else _FILE} r"
        case "open_write":
            yield f"{who}: {fd} = open {_FILE} rw"
        case "write":
            yield f"{who}: write {fd} doomed"
        case "write_back":
            yield "disk: push"
        case "lose" | "lose_space" as how:
            if who == "host":
                yield f"host: own = open lost{number} rw create"
                yield "host: write own doomed"
                yield "host: close own"
            yield "disk: fail data" + " ENOSPC" * (how == "lose_space")
            yield "disk: push"
            yield "disk: heal"
        case "abort":
            yield f"host: own = open lost{number} rw create"
            yield "disk: fail all"
            yield "disk: push"
            yield "disk: heal"
        case "remount_ro":
            yield f"{who}: read_only superblock"
        case "evict":
            yield f"host: drop {who}/upper/{_FILE}"
            yield "disk: evict"
        case "die":
            yield f"{who}: kill"
        case "fsync_dir":
            yield f"{who}: d{number} = open . dir"
            yield f"{who}: fsync d{number} -> 0|error"
        case "syncfs" | "fsync" | "close" as call:
            yield f"{who}: {call} {fd}{'' if call == 'close' else ' -> 0|error'}"
        case "mount" | "umount" as call:
            yield f"{who}: {call}{' -> 0|error' if call == 'umount' else ''}"
        case other:
            raise ValueError(f"an event {other!r}")
