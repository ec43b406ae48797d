"""A scenario: what is done, by whom, and what has to be answered. One TOML file each, in scenarios/ or the user's.

    title = "syncfs on a new descriptor tells the first in every container"
    need = "must"                          # or "nice"
    mounts = ["ordinary"]                  # the kinds of mount that the claim is about
    containers = 3                         # A, B, C; `each` is all of them, one after the other
    claim = "After an error of the upper the first syncfs in every container gets it, and the next does not."
    steps = [
      "each: mount",
      "A: f = open lost rw create",
      "disk: fail data",
      "A: write f doomed",
      "disk: push",
      "disk: heal",
      "each: s = open .",
      "each: syncfs s -> told",
      "each: syncfs s -> 0",
    ]

A step is `WHO: [NAME =] VERB WORDS [-> DUE]`. Every verb answers with one word: `0`, an errno's name, or what it found.
A step without `->` is a premise: unless it answers 0 nothing can be said, and the cell is *unknown*. A step with it is
what the claim is about: another answer, and the cell is *violated*. DUE may be several words with `|` between them;
`told` is any errno that a lost write can have, `error` any errno at all.

Nothing in a scenario names a system. What each verb means to each system is the business of overt.judge.systems, and
there it is mount and umount only: everything else is the same system calls for all.
"""

import errno
import re
import tomllib
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Self

from overt.judge.uppers import UPPERS
from overt.printable import printable

TOLD = frozenset({"EIO", "ENOSPC", "EDQUOT", "EROFS", "EUCLEAN"})
"""What a call may return that tells of a lost write: the error, or that the filesystem has shut down because of it."""

NEEDS = ("must", "nice")
KINDS = ("ordinary", "volatile")
LOWERS = ("elsewhere", "disk")
WITNESSES = ("cursor", "disk")

_MOST_CONTAINERS = 100_000
_LARGEST = 1 << 40
"""bytes of a disk"""

_STEP = re.compile(r"(?P<who>\w+): (?:(?P<name>\w+) = )?(?P<verb>\w+)(?P<words>(?: \S+)*?)(?: -> (?P<due>\S+))?")


class Nonsense(Exception):
    """A scenario asks for something that there is not."""


class Step(NamedTuple):
    who: str
    """a container (A, B, ...), `each`, `host`, or `disk`"""
    name: str
    """what the descriptor is called from now on; or empty"""
    verb: str
    words: tuple[str, ...]
    due: tuple[str, ...]
    """answers that keep the claim; none: a premise"""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError, saying what is wrong."""
        found = _STEP.fullmatch(text)
        if not found:
            raise ValueError(f"not a step: {text!r} (WHO: [NAME =] VERB WORDS [-> DUE])")
        due = tuple(found["due"].split("|")) if found["due"] else ()
        return cls(found["who"], found["name"] or "", found["verb"], tuple(found["words"].split()), due)

    @property
    def call(self) -> str:
        """As it was written, without who and what is due."""
        return " ".join([*((self.name, "=") if self.name else ()), self.verb, *self.words])

    def fits(self, answer: str) -> bool:
        """Whether this answer keeps the claim (or, of a premise, went well)."""
        if "told" in self.due and answer in TOLD:
            return True
        return answer in (self.due or ("0",)) or ("error" in self.due and hasattr(errno, answer))


class Scenario(NamedTuple):
    id: str
    """U5-new-fd: the file's name; what stands before the dash is the use case"""
    title: str
    need: str
    mounts: tuple[str, ...]
    containers: int
    claim: str
    steps: tuple[Step, ...]
    uppers: tuple[str, ...] = ()
    """the filesystems that it can happen on; none: all"""
    witness: str = "cursor"
    """who says whether a fault was real: a cursor on the plain upper, or the disk's own count"""
    layers: bool = False
    """whether it is about a lower layer, which the plain filesystem has not"""
    lower: str = "elsewhere"
    """where the lower layer is: on the failing `disk`, or elsewhere, from where nothing can be copied by reflink"""
    scales: bool = False
    """whether it can be run with a thousand containers"""
    size: int = 64 << 20
    """of the disk, in bytes"""
    note: str = ""

    @property
    def case(self) -> str:
        return self.id.partition("-")[0]

    @property
    def has_fault(self) -> bool:
        """Whether the disk is told to fail, so that a witness has to be asked whether it did."""
        return any(step.who == "disk" and step.verb == "fail" for step in self.steps)

    @property
    def letters(self) -> tuple[str, ...]:
        """The containers' names: A to Z, then A26, A27, ..."""
        return tuple(name_of(number) for number in range(self.containers))

    def with_containers(self, count: int) -> "Scenario":
        """The same with so many containers, if that makes sense; the disk grows with them."""
        if not self.scales:
            return self
        return self._replace(containers=max(count, self.containers), size=self.size + count * (256 << 10))


def name_of(number: int) -> str:
    """The name of a container, counted from 0."""
    return chr(ord("A") + number) if number < 26 else f"A{number}"


def read(path: Path, text: str | None = None) -> Scenario:
    """A scenario from a file (or from `text`, with the file's name). Raises OSError; ValueError naming the file."""
    try:
        fields = tomllib.loads(path.read_text("utf-8") if text is None else text)
        _check_kinds(fields)
        fields["steps"] = tuple(map(Step.parse, fields.get("steps", [])))
        fields["mounts"], fields["uppers"] = tuple(fields["mounts"]), tuple(fields.get("uppers", ()))
        fields["claim"] = " ".join(fields["claim"].split())
        scenario = Scenario(id=printable(path.stem), **{"containers": 1, **fields})
        _check(scenario)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return scenario


_KINDS = {
    "title": "a text", "need": "a text", "claim": "a text", "note": "a text", "witness": "a text", "lower": "a text",
    "mounts": "a list of texts", "uppers": "a list of texts", "steps": "a list of texts", "containers": "a number",
    "size": "a number", "layers": "true or false", "scales": "true or false",
}  # fmt: skip
"""what may be in a file, and of which kind it is"""
_IS_OF: Mapping[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str),
    "a list of texts": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
    "a number": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "true or false": lambda value: isinstance(value, bool),
}


def _check_kinds(fields: Mapping[str, Any]) -> None:
    for key in ("title", "need", "claim", "mounts"):
        if key not in fields:
            raise ValueError(f"it has no {key}")
    unknown = set(fields) - set(_KINDS)
    if unknown:
        raise ValueError(f"there is no {', '.join(sorted(unknown))} in a scenario")
    for key, value in fields.items():
        if not _IS_OF[_KINDS[key]](value):
            raise ValueError(f"{key} is not {_KINDS[key]}")


def _check(scenario: Scenario) -> None:
    if scenario.need not in NEEDS:
        raise ValueError(f"need is one of {', '.join(NEEDS)}")
    if not scenario.mounts or set(scenario.mounts) - set(KINDS):
        raise ValueError(f"mounts are some of {', '.join(KINDS)}")
    if scenario.witness not in WITNESSES:
        raise ValueError(f"witness is one of {', '.join(WITNESSES)}")
    if scenario.lower not in LOWERS:
        raise ValueError(f"lower is one of {', '.join(LOWERS)}")
    if set(scenario.uppers) - set(UPPERS):
        raise ValueError(f"uppers are some of {', '.join(UPPERS)}")
    if not 0 < scenario.containers <= _MOST_CONTAINERS:
        raise ValueError(f"containers are 1 to {_MOST_CONTAINERS}")
    if not 0 < scenario.size <= _LARGEST:
        raise ValueError(f"size is in bytes, {_LARGEST} at most")
    if not any(step.due for step in scenario.steps):
        raise ValueError("no step says what is due")
    from overt.judge import words  # which is made of what is made of scenarios

    known = {*scenario.letters, "each", "host", "disk"}
    for step in scenario.steps:
        if step.who not in known:
            raise ValueError(f"who is {step.who!r}? there are {', '.join(sorted(known))}")
        words.check(step)


def built_in() -> list[Scenario]:
    """All scenarios of this package, by number of the use case."""
    found = []
    for file in resources.files("overt.judge").joinpath("scenarios").iterdir():
        if file.name.endswith(".toml"):
            found.append(read(Path(file.name), file.read_text("utf-8")))
    return sorted(found, key=order)


def order(scenario: Scenario) -> tuple[str, int, str]:
    """U2 before U10; others after the use cases."""
    letter, number = re.fullmatch(r"(\D*)(\d*).*", scenario.case).groups()  # type: ignore[union-attr]
    return ("" if letter == "U" else letter, int(number or 0), scenario.id)
