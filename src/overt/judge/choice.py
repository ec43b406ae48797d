"""What a command line asks for: which scenarios, which systems."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from overt.judge import histories, scenario
from overt.judge.columns import SYSTEMS
from overt.judge.scenario import Scenario
from overt.judge.systems import System, from_command


def choose(files: Sequence[Path], only: Sequence[str], containers: int | None) -> list[Scenario]:
    """The user's own if there are files, else those of the package; of these `only` some (U5, or U5-new-fd).

    A file is a scenario, or (.json) what `overt prove --json` has printed. ValueError: it is neither, or there is none
    of that name, or two.
    """
    found = [one for path in files for one in _from_file(path)] or scenario.built_in()
    for name, count in Counter(one.id for one in found).items():
        if count > 1:
            raise ValueError(f"there are {count} scenarios {name!r}: a scenario has its file's name")
    for word in only:
        if not any(_is_named(one, word) for one in found):
            raise ValueError(f"there is no scenario {word!r}: --list shows them")
    chosen = [one for one in found if not only or any(_is_named(one, word) for word in only)]
    return [one.with_containers(containers) for one in chosen] if containers else chosen


def _is_named(one: Scenario, word: str) -> bool:
    return word.lower() in (one.id.lower(), one.case.lower())


def _from_file(path: Path) -> list[Scenario]:
    if path.suffix != ".json":
        return [scenario.read(path)]
    found, left_out = histories.read(path)
    for line in left_out:
        print(f"overt judge: left out: {line}", file=sys.stderr)
    return found


def choose_systems(names: Sequence[str], commands: Sequence[str], volatiles: Sequence[str]) -> list[System]:
    """Those of the table, or of these the named ones (none, if only commands are given); and the user's commands.

    ValueError: there is none of that name, or a command makes no sense.
    """
    known = {system.name: system for system in SYSTEMS}
    for name in names:
        if name not in known:
            raise ValueError(f"there is no system {name!r}: there are {', '.join(known)}")
    given = [_given("--system", line, "ordinary") for line in commands]
    given += [_given("--volatile-system", line, "volatile") for line in volatiles]
    _tell_apart(given)
    return [system for system in SYSTEMS if not names or system.name in names] + given


def _given(option: str, line: str, kind: str) -> System:
    try:
        return from_command(line, kind)
    except ValueError as error:
        raise ValueError(f"{option} {line!r}: {error}") from None


def _tell_apart(given: Sequence[System]) -> None:
    """Number those that have one name: `mount (given)`, `mount (given 2)`."""
    seen: Counter[str] = Counter()
    for system in given:
        name = system.name
        seen[name] += 1
        if seen[name] > 1:
            system.name = f"{name.removesuffix(')')} {seen[name]})"
