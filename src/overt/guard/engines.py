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

from overt.guard.change import Change

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

    Raises InstallError, OSError.
    """
    path, before = directory / "daemon.json", directory / BEFORE
    original = _docker_before(directory)
    whole = _json(path, original or "{}")
    runtimes = whole.get("runtimes", {})
    if NAME in runtimes:
        raise InstallError(f"{path}: there is a runtime named {NAME} that is not ours")
    used = runtimes.get(whole.get("default-runtime", "runc"), {})
    if used.get("runtimeArgs") and not wrapped.runtime:
        raise InstallError(f"{path}: the default runtime takes arguments: name the program to wrap with --runtime")
    program, *words = wrapped.words(wrapped.runtime or used.get("path", "runc"))
    whole["runtimes"] = {**runtimes, NAME: {"path": program, "runtimeArgs": words}}
    if default:
        whole["default-runtime"] = NAME
    changes = [] if original is None else [Change(before, original)]
    return _needed([*changes, Change(path, json.dumps(whole, indent=2) + "\n")])


def out_of_docker(directory: Path) -> list[Change]:
    """The changes that take it back. Raises InstallError, OSError."""
    path, before = directory / "daemon.json", directory / BEFORE
    original = _docker_before(directory)
    changes = [Change(path, original)] if original is not None or path.exists() else []
    if before.exists():
        changes.append(Change(before, None))
    return _needed(changes)


def _docker_before(directory: Path) -> str | None:
    """daemon.json as it would be without us; None: no file."""
    path, before = directory / "daemon.json", directory / BEFORE
    if not path.exists():
        return None
    text = path.read_text()
    whole = _json(path, text)
    if NAME not in whole.get("runtimes", {}) or not _is_ours(whole["runtimes"][NAME]):
        return text
    was = _json(before, before.read_text()) if before.exists() else {}
    del whole["runtimes"][NAME]
    if not whole["runtimes"] and "runtimes" not in was:
        del whole["runtimes"]
    if whole.get("default-runtime") == NAME:
        del whole["default-runtime"]
        if "default-runtime" in was:
            whole["default-runtime"] = was["default-runtime"]
    if whole == was:
        return before.read_text() if before.exists() else None
    return json.dumps(whole, indent=2) + "\n"


def _is_ours(runtime: dict[str, Any]) -> bool:
    return Path(runtime.get("path", "")).name == PROGRAM


def into_containerd(directory: Path, wrapped: Wrapped) -> list[Change]:
    """The changes to /etc/containerd (`directory`), for CRI: a runtime handler that a RuntimeClass can name.

    It has what the configuration's own `runc` has (SystemdCgroup, say). Raises InstallError, OSError.
    """
    path, script = directory / "config.toml", directory / PROGRAM
    original = _containerd_before(path)
    whole: dict[str, Any] = _toml(path, original) if original is not None else {"version": 2}
    version = whole.get("version", 1)
    if version not in _CRI:
        raise InstallError(f"{path}: version {version} is not known: 2 and 3 are (see `containerd config migrate`)")
    runtimes = whole.get("plugins", {}).get(_CRI[version], {}).get("containerd", {}).get("runtimes", {})
    if NAME in runtimes:
        raise InstallError(f"{path}: there is a runtime named {NAME} that is not ours")
    model = {"runtime_type": _V2_RUNC, **runtimes.get("runc", {})}
    if model["runtime_type"] != _V2_RUNC:
        raise InstallError(f"{path}: runc's runtime_type is {model['runtime_type']}: the guard knows {_V2_RUNC}")
    options = model.pop("options", {})
    words = wrapped.words(wrapped.runtime or options.get("BinaryName") or "runc")
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
    return _needed([Change(script, starter, 0o755), Change(path, text)])


def out_of_containerd(directory: Path) -> list[Change]:
    """The changes that take it back. Raises InstallError, OSError."""
    path, script = directory / "config.toml", directory / PROGRAM
    changes = [Change(path, _containerd_before(path))] if path.exists() else []
    if script.exists():
        changes.append(Change(script, None))
    return _needed(changes)


def _containerd_before(path: Path) -> str | None:
    """config.toml as it would be without us; None: no file."""
    if not path.exists():
        return None
    text = path.read_text()
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
    try:
        whole = json.loads(text)
        if not isinstance(whole, dict) or not isinstance(whole.get("runtimes", {}), dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise InstallError(f"{path}: {error}") from None
    return whole


def _toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise InstallError(f"{path}: {error}") from None


def _needed(changes: list[Change]) -> list[Change]:
    """Those that change something."""
    return [
        change for change in changes
        if (change.path.read_text() if change.path.exists() else None) != change.content
    ]  # fmt: skip
