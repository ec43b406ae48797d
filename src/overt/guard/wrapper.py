"""In an OCI runtime's place: what it creates gets a seccomp profile that hands syncfs(2) to the guard.

    overt-runc [--guard-socket PATH] [--guard-runtime PROGRAM] ARGUMENTS OF THE RUNTIME

For engines that cannot say listenerPath themselves: dockerd reads profiles without it, and containerd's CRI makes its
own. Only the commands that read a bundle's config.json are touched (create, run, restore). Then the process becomes the
runtime, which for `exec` takes the profile from its own state.

An error goes where the runtime's would: to standard error, and into the file of --log, whose last line containerd's
shim shows to the user.

An engine calls its runtime for everything, so only what every call needs is imported at once.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

if TYPE_CHECKING:
    from overt.guard.change import Change

SOCKET = "/run/overt/guard.sock"
RUNTIME = "runc"
_READ_A_BUNDLE = {"create", "run", "restore"}
_OTHERS = {
    "", "checkpoint", "delete", "events", "exec", "features", "help", "kill", "list", "mounts", "pause", "ps", "resume",
    "spec", "start", "state", "update",
}  # fmt: skip
_VALUED = {"--log", "--log-format", "--root", "--criu", "--rootless", "--cgroup-manager"}
"""options of runc's and crun's, before the command, that take a value"""


class WrapperError(Exception):
    """Why the runtime was not started."""


class Call(NamedTuple):
    """A runtime's command line, as far as it matters here."""

    command: str
    """"" if there is none"""
    config: str
    """what it reads, if it is one of those that do"""
    log: str
    log_format: str


def read(args: Sequence[str]) -> Call:
    """Read a runtime's command line.

    Raises WrapperError where it cannot be told which word is the command, and one of them is `create` or its like: that
    container would run unguarded, and nobody would know.
    """
    words = iter(args)
    given: dict[str, str] = {}
    command = ""
    for word in words:
        if not word.startswith("-"):
            command = word
            break
        name, equals, value = word.partition("=")
        given[name] = value if equals or name not in _VALUED else next(words, "")
    rest = list(words)
    if command not in _READ_A_BUNDLE | _OTHERS and _READ_A_BUNDLE & set(rest):
        raise WrapperError(f"no command of a runtime's: {command}")
    config = os.path.join(_option(rest, "--bundle", "-b"), _option(rest, "--config", "-f") or "config.json")
    return Call(command, config, given.get("--log", ""), given.get("--log-format", ""))


def _option(words: Sequence[str], *names: str) -> str:
    """The value of an option, or ""."""
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else "".join(words[number + 1 : number + 2])
    return ""


def guard(config: str, socket: str) -> "Change":
    """The change to a bundle's config.json. Raises ProfileError (a ValueError), OSError."""
    import json
    from pathlib import Path

    from overt.guard import profile
    from overt.guard.change import Change

    made = profile.make(profile.load(config), socket)
    whole = json.loads(Path(config).read_text())
    whole["linux"]["seccomp"] = made
    return Change(Path(config), json.dumps(whole))


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The entry point."""
    words = list(sys.argv[1:] if args is None else args)
    own = {"--guard-socket": SOCKET, "--guard-runtime": RUNTIME}
    while words and words[0].partition("=")[0] in own:
        name, equals, value = words.pop(0).partition("=")
        own[name] = value if equals else words.pop(0) if words else ""
    call = None
    try:
        call = read(words)
        if call.command in _READ_A_BUNDLE:
            guard(call.config, own["--guard-socket"]).make()
        _become(own["--guard-runtime"], words)
    except (WrapperError, ValueError, OSError) as error:
        _complain(str(error), call)
        sys.exit(1)


def _become(runtime: str, args: Sequence[str]) -> NoReturn:
    try:
        os.execvp(runtime, [runtime, *args])
    except FileNotFoundError:
        raise WrapperError(f"no such runtime: {runtime} (name it with --guard-runtime)") from None


def _complain(what: str, call: Call | None) -> None:
    """Say why, as the runtime does."""
    import json
    import time
    from contextlib import suppress

    message = f"overt guard: {what}"
    print(message, file=sys.stderr)
    if call is None or not call.log:
        return
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if call.log_format == "json":
        line = json.dumps({"level": "error", "msg": message, "time": now})
    else:
        line = f'time="{now}" level=error msg={json.dumps(message)}'
    with suppress(OSError), open(call.log, "a") as log:  # standard error has it
        log.write(line + "\n")
