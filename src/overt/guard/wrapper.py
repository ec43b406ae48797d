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
import signal
import sys
from collections.abc import Iterator, Sequence
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
_VALUED = {"log", "log-format", "log-level", "root", "criu", "rootless", "cgroup-manager"}
_FLAGS = {"debug", "systemd-cgroup", "version", "v", "V", "help", "h", "usage"}
"""options of runc's and crun's, before the command: those that take a value, and those that do not"""
_BUNDLE, _CONFIG = ("bundle", "b"), ("config", "f")
_VALUED_AFTER = {
    *_BUNDLE, *_CONFIG, "console-socket", "empty-ns", "image-path", "lsm-mount-context", "lsm-profile",
    "manage-cgroups-mode", "pid-file", "pidfd-socket", "preserve-fds", "work-path",
}  # fmt: skip
_FLAGS_AFTER = {
    "auto-dedup", "d", "detach", "ext-unix-sk", "file-locks", "keep", "lazy-pages", "link-remap", "no-new-keyring",
    "no-pivot", "no-subreaper", "shell-job", "tcp-close", "tcp-established", "tcp-skip-in-flight",
}  # fmt: skip
"""of create, run and restore"""


class WrapperError(Exception):
    """Why the runtime was not started."""


class Call(NamedTuple):
    """A runtime's command line, as far as it matters here."""

    command: str
    """"" if there is none"""
    rest: list[str]
    """what follows it"""
    sure: bool
    """no option before it is unknown, whose value it may be"""
    log: str
    log_format: str

    @property
    def reads_a_bundle(self) -> bool:
        """Whether this command reads a bundle's config.json.

        Raises WrapperError where it cannot be told which word is the command, and one of them is `create` or its like:
        that container would run unguarded, and nobody would know.
        """
        known = self.command in _READ_A_BUNDLE | _OTHERS
        reads = self.command in _READ_A_BUNDLE
        if not (reads or (known and self.sure)) and _READ_A_BUNDLE & set(self.rest):
            raise WrapperError(f"no command of a runtime's, or the value of an unknown option: {self.command}")
        return reads

    @property
    def config(self) -> str:
        """The file that such a command reads. Raises WrapperError for an option that may name another, likewise."""
        given = {}
        rest = list(self.rest)
        for word, name, value in _options(rest, _VALUED_AFTER):
            known = name in _VALUED_AFTER or name in _FLAGS_AFTER
            if not known and (_may_name_one(word) or ("=" not in word and any(map(_may_name_one, rest)))):
                raise WrapperError(f"not an option that is known, and it may say which bundle: {word}")
            given[_BUNDLE[0] if name in _BUNDLE else _CONFIG[0] if name in _CONFIG else name] = value
        late = [word for word in rest if _may_name_one(word)]
        if late:  # runc takes it as an option, crun does not
            raise WrapperError(f"after the container's name, and it may say which bundle: {late[0]}")
        return os.path.join(given.get(_BUNDLE[0], ""), given.get(_CONFIG[0]) or "config.json")


def read(args: Sequence[str]) -> Call:
    """Read a runtime's command line."""
    rest = list(args)
    options = list(_options(rest, _VALUED))
    given = {name: value for _, name, value in options}
    sure = all("=" in word or name in _VALUED | _FLAGS for word, name, _ in options)
    command = rest.pop(0) if rest else ""
    return Call(command, rest, sure, given.get("log", ""), given.get("log-format", ""))


def _options(words: list[str], valued: set[str]) -> Iterator[tuple[str, str, str]]:
    """The options in front, taken off `words`, each as it is written, its name and its value.

    Those of `valued` have the next word if there is no =. One dash is as good as two, as runc has it.
    """
    while words and words[0].startswith("-") and words[0] not in ("-", "--"):
        word = words.pop(0)
        name, equals, value = word[2 if word.startswith("--") else 1 :].partition("=")
        if name in valued and not equals:
            value = words.pop(0) if words else ""
        yield word, name, value


def _may_name_one(word: str) -> bool:
    """Whether it can be an abbreviation (--bund), or letters together (-b/path, -db/path), as crun has them."""
    return word.startswith(("--b", "--c")) or (word[:1] == "-" != word[1:2] and bool({"b", "f"} & {*word}))


def guard(config: str, socket: str) -> "Change":
    """The change to a bundle's config.json. Raises ProfileError (a ValueError), OSError."""
    import json
    from pathlib import Path

    from overt.guard import profile
    from overt.guard.change import Change
    from overt.guard.change import read as read_file

    path = Path(config)
    return Change(path, json.dumps(profile.guarded(read_file(path), config, socket)))


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The entry point."""
    words = list(sys.argv[1:] if args is None else args)
    own = {"--guard-socket": SOCKET, "--guard-runtime": RUNTIME}
    while words and words[0].partition("=")[0] in own:
        name, equals, value = words.pop(0).partition("=")
        own[name] = value if equals else words.pop(0) if words else ""
    call = read(words)
    try:
        if call.reads_a_bundle:
            guard(call.config, own["--guard-socket"]).make()
        _become(own["--guard-runtime"], words)
    except OSError as error:
        _complain(f"{error.strerror}: {error.filename}" if error.filename else str(error), call)
    except (WrapperError, ValueError, RecursionError) as error:
        _complain(str(error), call)
    sys.exit(1)


def _become(runtime: str, args: Sequence[str]) -> NoReturn:
    """Start the runtime as if it had been started at once: without what Python has changed."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    environment = _environment()
    try:
        os.execvpe(runtime, [runtime, *args], environment)
    except FileNotFoundError:
        raise WrapperError(f"no such runtime: {runtime} (name it with --guard-runtime)") from None
    except OSError as error:
        raise WrapperError(f"the runtime cannot be started: {runtime}: {error.strerror}") from None


def _environment() -> dict[bytes, bytes]:
    """The environment with the LC_CTYPE that was given, if one was: Python sets it in the C locale (PEP 538)."""
    made = dict(os.environb)
    with open("/proc/self/environ", "rb") as file:
        given = [word for word in file.read().split(b"\0") if word.startswith(b"LC_CTYPE=")]
    made.pop(b"LC_CTYPE", None)
    if given:
        made[b"LC_CTYPE"] = given[0].partition(b"=")[2]
    return made


def _complain(what: str, call: Call) -> None:
    """Say why, as the runtime does."""
    import json
    import time
    from contextlib import suppress

    message = f"overt guard: {what}"
    print(message, file=sys.stderr)
    if not call.log:
        return
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if call.log_format == "json":
        line = json.dumps({"level": "error", "msg": message, "time": now})
    else:
        line = f'time="{now}" level=error msg={json.dumps(message)}'
    with suppress(OSError), open(call.log, "a") as log:  # standard error has it
        log.write(line + "\n")
