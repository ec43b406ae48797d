"""Docker and containerd: a runtime of the name `overt`, which is the wrapper (guard/wrapper.py) around runc or another.

docker       an entry in daemon.json's "runtimes", and "default-runtime" if asked for. JSON has no comments, so what was
             there before is kept beside, and taken back as it was unless somebody has changed the file meanwhile: then
             only our entry is taken out.
containerd   tables at the end of config.toml, between two comments; everything above them stays byte for byte. CRI's
             runtimes take no arguments, so BinaryName is a script of one line.
"""

import json
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from overt.guard.change import Change, needed, read

NAME = "overt"
DOCKER = Path("/etc/docker")
CONTAINERD = Path("/etc/containerd")
PROGRAM = "overt-runc"
BEFORE = "daemon.json.before-overt-guard"
_BEGIN, _END = "\n# overt guard: begin (`overt guard uninstall containerd` removes this)\n", "# overt guard: end\n"
_VERSION = "version = 2\n"
_CRI = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}
"""the plugin that has the runtimes, by config.toml's version (containerd, docs/cri/config.md)"""
_V2_RUNC = "io.containerd.runc.v2"


class InstallError(ValueError):
    """Why an engine's configuration cannot be changed."""


class Wrapped(NamedTuple):
    """What an engine is to start in the place of a runtime."""

    socket: str
    runtime: str | None
    """a program; None: what the engine uses now"""

    def words(self, runtime: str) -> list[str]:
        """The command line of the wrapper around `runtime`. Raises InstallError if one of the two is not installed."""
        found = {}
        for program in (PROGRAM, runtime):
            found[program] = shutil.which(program)
            if found[program] is None:
                raise InstallError(f"not installed, or not on the PATH: {program}")
        return [str(found[PROGRAM]), "--guard-socket", self.socket, "--guard-runtime", str(found[runtime])]


def into_docker(directory: Path, wrapped: Wrapped, *, default: bool) -> list[Change]:
    """The changes to /etc/docker (`directory`); with `default`, containers that name no runtime are guarded, too.

    They stay guarded if they are already. Raises InstallError, OSError.
    """
    path, before = directory / "daemon.json", directory / BEFORE
    original = _docker_before(directory)
    whole = _json(path, original or "")
    runtimes = whole.get("runtimes") or {}
    if NAME in runtimes:
        raise InstallError(f"{path}: there is a runtime named {NAME} that is not ours")
    program, *words = wrapped.words(wrapped.runtime or _docker_runtime(path, whole))
    whole["runtimes"] = {**runtimes, NAME: {"path": program, "runtimeArgs": words}}
    if default or (path.exists() and _json(path, read(path)).get("default-runtime") == NAME):
        whole["default-runtime"] = NAME
    changes = [] if original is None else [Change(before, original, like=path)]
    return needed([*changes, Change(path, json.dumps(whole, indent=2) + "\n")])


def is_in_docker(directory: Path) -> bool:
    """Whether the guard's runtime is in daemon.json. Raises InstallError, OSError."""
    path = directory / "daemon.json"
    return path.exists() and _has_ours(_json(path, read(path)))


def _docker_runtime(path: Path, whole: dict[str, Any]) -> str:
    """The program that docker starts for containers that name no runtime."""
    name = whole.get("default-runtime") or "runc"
    entry = (whole.get("runtimes") or {}).get(name, {})
    if "runtimeType" in entry or ("path" not in entry and name != "runc"):
        raise InstallError(
            f"{path}: it does not say which program the default runtime is, {name}: name the program with --runtime"
        )
    if entry.get("runtimeArgs"):
        raise InstallError(f"{path}: the default runtime takes arguments: name the program to wrap with --runtime")
    return str(entry.get("path", "runc"))


def out_of_docker(directory: Path) -> list[Change]:
    """The changes that take it back. Raises InstallError, OSError."""
    path, before = directory / "daemon.json", directory / BEFORE
    original = _docker_before(directory)
    changes = [Change(path, original)] if original is not None or path.exists() else []
    if before.exists():
        changes.append(Change(before, None))
    return needed(changes)


def _docker_before(directory: Path) -> str | None:
    """daemon.json as it would be without us; None: no file."""
    path, before = directory / "daemon.json", directory / BEFORE
    if not path.exists():
        return None
    text = read(path)
    whole = _json(path, text)
    if not _has_ours(whole):
        return text
    was = _json(before, read(before)) if before.exists() else {}
    del whole["runtimes"][NAME]
    if not whole["runtimes"] and not was.get("runtimes"):
        del whole["runtimes"]
        if "runtimes" in was:
            whole["runtimes"] = was["runtimes"]
    if whole.get("default-runtime") == NAME:
        del whole["default-runtime"]
        if "default-runtime" in was:
            whole["default-runtime"] = was["default-runtime"]
    if whole == was:
        return read(before) if before.exists() else None
    return json.dumps(whole, indent=2) + "\n"


def _has_ours(whole: dict[str, Any]) -> bool:
    entry = (whole.get("runtimes") or {}).get(NAME, {})
    return Path(entry.get("path", "")).name == PROGRAM


def into_containerd(directory: Path, wrapped: Wrapped) -> list[Change]:
    """The changes to /etc/containerd (`directory`), for CRI: a runtime handler that a RuntimeClass can name.

    It has what the configuration's own `runc` has (SystemdCgroup, say). Raises InstallError, OSError.
    """
    path, script = directory / "config.toml", directory / PROGRAM
    original = _containerd_before(path)
    whole: dict[str, Any] = _toml(path, original) if original is not None else {"version": 2}
    version = whole.get("version", 1)
    if version not in (2, 3):
        raise InstallError(f"{path}: version {version} is not known: 2 and 3 are (see `containerd config migrate`)")
    runtimes = _runtimes(path, whole, _CRI[version])
    if NAME in runtimes:
        raise InstallError(f"{path}: there is a runtime named {NAME} that is not ours")
    model = {"runtime_type": _V2_RUNC, **_table(path, runtimes, "runc")}
    if model["runtime_type"] != _V2_RUNC:
        raise InstallError(f"{path}: runc's runtime_type is {model['runtime_type']}: the guard knows {_V2_RUNC}")
    options = _table(path, model, "options")
    model.pop("options", None)
    used = options.get("BinaryName") or "runc"
    if not isinstance(used, str):
        raise InstallError(f"{path}: runc's BinaryName is not the name of a program")
    words = wrapped.words(wrapped.runtime or used)
    where = f'plugins."{_CRI[version]}".containerd.runtimes'
    tables = [
        *([_VERSION.strip()] if original is None else []),
        # The first runtime in a file takes the place of containerd's own `runc`, and CRI does not come up without one.
        *([] if runtimes else [f"[{where}.runc]", f'runtime_type = "{_V2_RUNC}"']),
        f"[{where}.{NAME}]", *_lines(model),
        f"[{where}.{NAME}.options]", *_lines({**options, "BinaryName": str(script.absolute())}),
    ]  # fmt: skip
    text = (original or "") + _BEGIN + "\n".join(tables) + "\n" + _END
    _toml(path, text)  # or `runtimes` was written in a way that cannot be added to
    starter = f'#!/bin/sh\n# Made by `overt guard install containerd`.\nexec {shlex.join(words)} "$@"\n'
    return needed([Change(script, starter, 0o755), Change(path, text)])


def out_of_containerd(directory: Path) -> list[Change]:
    """The changes that take it back. Raises InstallError, OSError."""
    path, script = directory / "config.toml", directory / PROGRAM
    changes = [Change(script, None)] if script.exists() else []
    if path.exists():
        original = _containerd_before(path)
        changes = needed([Change(path, original), *changes])
        whole = _toml(path, original or "") if changes else {}
        if any(NAME in _runtimes(path, whole, plugin) for plugin in _CRI.values()):
            raise InstallError(
                f"{path}: the runtime {NAME} is not between our two comments, or they are damaged: remove it by hand"
            )
    return changes


def _containerd_before(path: Path) -> str | None:
    """config.toml as it would be without us; None: no file."""
    if not path.exists():
        return None
    text = read(path)
    above, begin, ours = text.partition(_BEGIN)
    between, end, below = ours.partition(_END)
    if begin and not end:
        raise InstallError(f"{path}: {_BEGIN.strip()!r} is there, and {_END.strip()!r} is not")
    rest = above + below
    if between.startswith(_VERSION):  # there was no file
        return _VERSION + rest if rest else None
    return rest


def _lines(table: dict[str, Any]) -> list[str]:
    """A table's values in TOML; tables in it are left out, for they are annotations of other handlers."""
    return [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]


def _json(path: Path, text: str) -> dict[str, Any]:
    """daemon.json, an empty file of which is one without settings, as dockerd has it."""
    try:
        whole = json.loads(text) if text.strip() else {}
    except RecursionError:
        raise InstallError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise InstallError(f"{path}: {error}") from None
    if not isinstance(whole, dict):
        raise InstallError(f"{path}: not an object")
    runtimes = whole.get("runtimes")
    if not isinstance(runtimes, dict | None):
        raise InstallError(f"{path}: runtimes is not an object")
    for name, entry in (runtimes or {}).items():
        if not isinstance(entry, dict) or not isinstance(entry.get("path", ""), str):
            raise InstallError(f"{path}: the runtime {name} is not an object with a path")
    if not isinstance(whole.get("default-runtime"), str | None):
        raise InstallError(f"{path}: default-runtime is not a name")
    return whole


def _toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InstallError(f"{path}: {error}") from None


def _runtimes(path: Path, whole: dict[str, Any], plugin: str) -> dict[str, Any]:
    """The runtimes of CRI."""
    for name in ("plugins", plugin, "containerd", "runtimes"):
        whole = _table(path, whole, name)
    return whole


def _table(path: Path, within: dict[str, Any], name: str) -> dict[str, Any]:
    found = within.get(name, {})
    if not isinstance(found, dict):
        raise InstallError(f"{path}: {name} is not a table")
    return found
