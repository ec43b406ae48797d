"""The words of a step: which verbs there are, how many words they take, and which of these mean something.

Read off the verbs themselves (overt.judge.party, overt.judge.stage), before anything is played: a wrong word would be
found only on the disk that was made for it, or mean something else.
"""

import errno
import inspect
from collections.abc import Callable, Mapping

from overt.judge.party import FLAGS, READ_ONLY, Calls, contents
from overt.judge.scenario import Step
from overt.judge.stage import OF_SYSTEMS, Stage
from overt.lab.image import MEANING

_ERRNOS = frozenset(errno.errorcode.values())
_CONTENTS = frozenset(contents(b" "))
_DUE = frozenset(
    {"0", "told", "error", "refused", "absent", "empty", "other", "yes", "no", "kept", "lost"}
) | _ERRNOS | _CONTENTS  # fmt: skip
_KNOWN: Mapping[tuple[str, str], frozenset[str]] = {
    ("open", "flags"): frozenset(FLAGS),
    ("write", "what"): _CONTENTS,
    ("map", "what"): _CONTENTS,
    ("holds", "what"): _CONTENTS,
    ("newly", "call"): frozenset({"syncfs", "fsync", "fdatasync"}),
    ("commit", "call"): frozenset({"syncfs", "fsync", "fdatasync"}),
    ("read_only", "what"): frozenset(READ_ONLY),
    ("fail", "what"): frozenset(MEANING),
    ("fail", "code"): _ERRNOS,
}
"""verb and parameter: what it may be"""
_NUMBERS = {"blocks": 10, "at": 10, "rounds": 10, "points": 10, "size": 10, "mode": 8}
"""parameters that are numbers, and to which base"""
_ONE_AT_LEAST = ("rounds", "points")
_DIGITS = 12


def check(step: Step) -> None:
    """ValueError: a word of this step that means nothing."""
    method, first = _method(step)
    try:
        bound = inspect.signature(method).bind(*first, *step.words)
    except TypeError as error:
        raise ValueError(f"{step.call}: {error}") from None
    for parameter, value in list(bound.arguments.items())[len(first) :]:
        for word in value if isinstance(value, tuple) else (value,):
            known = _KNOWN.get((step.verb, parameter))
            if known is not None and word not in known:
                raise ValueError(f"{step.call}: there is no {word!r}: there are {', '.join(sorted(known))}")
            if parameter in _NUMBERS and not _is_number(word, _NUMBERS[parameter]):
                raise ValueError(f"{step.call}: {word!r} is not a number")
            if parameter in _ONE_AT_LEAST and int(word) == 0:
                raise ValueError(f"{step.call}: 0 {parameter} are none")
    for word in step.due:
        if word not in _DUE:
            raise ValueError(f"{step.call}: nothing answers {word!r}: due can be {', '.join(sorted(_DUE - _ERRNOS))}, "
                             "or an errno's name")  # fmt: skip


def _method(step: Step) -> tuple[Callable[..., str], tuple[object, ...]]:
    """What is called for a step, and with what before its words."""
    if step.who == "disk":
        method = getattr(Stage, f"disk_{step.verb}", None)
    elif step.who != "host" and step.verb in OF_SYSTEMS:
        method = OF_SYSTEMS[step.verb]
    else:
        method = None if step.verb.startswith("_") else getattr(Calls, step.verb, None)
    if method is None:
        raise ValueError(f"{step.who} has no verb {step.verb!r}")
    return method, (None,) if step.who == "disk" else (None, step.name)


def _is_number(word: str, base: int) -> bool:
    digits = "01234567" if base == 8 else "0123456789"
    return 0 < len(word) <= _DIGITS and set(word) <= set(digits)
