"""overt guard: a truthful syncfs(2) for stock containers on the kernel's overlayfs."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from overt.cli.report import complain
from overt.cli.serve import tell_ready
from overt.printable import printable

if TYPE_CHECKING:
    from overt.guard.change import Change

_SOCKET = click.option(
    "--socket", "socket_path", metavar="PATH", help="The guard's socket (default: /run/overt/guard.sock)."
)


_UNKNOWN = 3
"""the exit status of a check that did not find out, as `overt judge` has it"""
_ENGINES = {"podman": "/etc/containers", "docker": "/etc/docker", "containerd": "/etc/containerd", "bundle": ""}
"""where each has its configuration"""
_ENGINE = click.argument("engine", type=click.Choice(list(_ENGINES)))
_BUNDLE = click.argument("bundle", type=click.Path(file_okay=False, exists=True, path_type=Path), required=False)
_DIRECTORY = click.option(
    "--directory", metavar="DIR", type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Where the engine's configuration is (default: /etc/containers, /etc/docker, /etc/containerd).",
)  # fmt: skip
_RELOAD, _RESTART = "systemctl reload docker", "systemctl restart containerd"
_NOT_GUARDED = "create containers that exist already again: they are not guarded, however often they are started"
_STILL_GUARDED = "create containers that were created meanwhile again: they do not start without the guard"
_NO_RUNTIME = "create containers that have the runtime overt again: they do not start any more"
_DRY_RUN = click.option("--dry-run", is_flag=True, help="Show what would be changed, and change nothing.")


@click.group(no_args_is_help=False)
def command() -> None:
    """Answer syncfs(2) truthfully for stock containers on the kernel's own overlayfs.

    Their seccomp profile hands that one call to a process on the host; see docs/guard.md.
    """


def _path(given: str | None) -> Path:
    from overt.server import registry

    return Path(given).absolute() if given else registry.directory() / "guard.sock"


@command.command()
@_SOCKET
@click.option("-f", "--foreground", is_flag=True, help="Events go to standard error instead of syslog.")
@click.option("--ready-fd", type=int, metavar="FD", help="Write a byte to this descriptor when ready, and close it.")
@click.option(
    "--blame", type=click.Choice(["all", "owner"]), default="all", show_default=True,
    help="Whom to tell of a lost write: all on that filesystem, or those whose files it was, if that is certain.",
)  # fmt: skip
def run(socket_path: str | None, ready_fd: int | None, blame: str, *, foreground: bool) -> None:
    """Guard the containers whose profile names the socket as its listenerPath.

    SIGTERM ends it; containers that still run get ENOSYS from syncfs(2) from then on.
    """
    from overt.events import Events
    from overt.guard import activation, supervisor

    supervisor.prepare()
    guard = supervisor.Supervisor(_path(socket_path), Events(foreground=foreground), blame, handed=activation.sockets())
    if guard.lacking and not foreground:
        complain("overt guard", f"not root: {guard.lacking}")
    try:
        tell_ready(ready_fd)
    except OSError:
        guard.close()
        raise
    guard.run()


@command.command()
@_SOCKET
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def status(socket_path: str | None, *, as_json: bool) -> None:
    """Show what is guarded, and the errors that were recorded."""
    from overt.guard import supervisor

    state: dict[str, Any] = supervisor.ask(_path(socket_path))
    if as_json:
        click.echo(json.dumps(state, indent=2))
        return
    click.echo(
        f"guard {state['supervisor']}: worker {state['worker']} (number {state['generation']}), "
        f"{len(state['containers'])} listeners, {state['answered']} calls answered"
    )
    for each in state["containers"]:
        click.echo(f"  {printable(each['id'])}  pid {each['pid']}, {each['overlays']} overlays, {each['calls']} calls")
    for overlay in state["overlays"]:
        trouble = f"  errors {overlay['errors']}, told {overlay['told']}, owed to {overlay['owed']}"
        click.echo(
            f"  {printable(overlay['upperdir'])}{trouble if overlay['errors'] else ''}"
            f"{'' if overlay['guarded'] else '  NOT GUARDED'}"
        )
    for upper in state["uppers"]:
        refused = f" (no probes: {upper['refused']})" if upper["refused"] else ""
        click.echo(f"  upper {upper['device']}: sees by {upper['eyes']}{refused}, {upper['flushes']} flushes")
        for error in upper["errors"]:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(error["when"]))
            taken = ", taken from the host" if error["taken"] else ""
            what = f"error {error['number']}: {os.strerror(error['errno'])}"
            click.echo(f"    {what}, {when}, by {error['source']}{taken}; told in {error['told']} overlays")
            for each in error["lost"]:
                where = f"{each['container']} ({each['image']})" if each["image"] else each["container"]
                what = f"{'lost' if each['certain'] else 'perhaps lost'}: {each['path']} in {where}"
                click.echo(f"      {printable(what)}")


def read_address(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, int] | None:
    """``HOST:PORT``, ``[::1]:PORT``, or ``:PORT``."""
    if value is None:
        return None
    host, _, port = value.rpartition(":")
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
        raise click.BadParameter(f"no address and port: {value}")
    return host, int(port)


@command.command()
@_SOCKET
@click.option("--listen", metavar="ADDRESS:PORT", callback=read_address, help="Answer HTTP there.")
@click.option(
    "--textfile", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path),
    help="Write this file every 15 seconds, for the textfile collector of Prometheus's node exporter.",
)  # fmt: skip
def metrics(socket_path: str | None, listen: tuple[str, int] | None, textfile: Path | None) -> None:
    """Tell Prometheus what the guard does: errors, calls and how long they took, containers.

    Without an option, print that once; a guard that does not answer is a metric, overt_guard_up 0, and no failure.
    """
    if listen is not None and textfile is not None:
        raise click.UsageError("--listen or --textfile, and not both: one process does one of them")
    try:
        from overt.guard import exporter
    except ModuleNotFoundError as error:
        raise click.ClickException(f"not installed: {error.name} (Debian: python3-prometheus-client)") from None
    path = _path(socket_path)
    if listen is not None:
        exporter.serve(path, *listen)
    elif textfile is not None:
        exporter.write(path, textfile)
    else:
        click.echo(exporter.text(path), nl=False)


@command.command()
@_SOCKET
@click.option(
    "--from", "base", metavar="FILE",
    help="A profile to start from, or an OCI config.json (default: one that filters nothing else).",
)  # fmt: skip
@click.option(
    "--oci", is_flag=True,
    help="In the form of an OCI config.json, which Kubernetes' nodes read; for a container's default capabilities.",
)  # fmt: skip
def profile(socket_path: str | None, base: str | None, *, oci: bool) -> None:
    """Print a seccomp profile in which syncfs(2) is the guard's to answer.

    For podman: --security-opt seccomp=FILE, or seccomp_profile in containers.conf. For runc and crun: linux.seccomp in
    config.json.
    """
    from overt.guard import oci as forms
    from overt.guard import profile as profiles

    try:
        given = profiles.load(base)
        made = profiles.make(forms.resolve(given) if oci else given, str(_path(socket_path)))
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    click.echo(json.dumps(made, indent=2))


@command.command()
@_ENGINE
@_BUNDLE
@_SOCKET
@_DIRECTORY
@click.option(
    "--runtime", metavar="PROGRAM",
    help="What docker or containerd are to start in the end (default: what they start now).",
)  # fmt: skip
@click.option("--default", is_flag=True, help="docker: guard the containers that name no runtime, too.")
@_DRY_RUN
def install(
    engine: str, bundle: Path | None, socket_path: str | None, directory: Path | None, runtime: str | None,
    *, default: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Have podman, docker, containerd, or an OCI bundle of runc or crun, hand syncfs(2) to the guard.

    docker and containerd get a runtime named `overt`. It holds for containers that are created afterwards: those that
    exist keep what they were created with, and are not guarded. Without a guard that runs they do not start.
    """
    from overt.guard import engines
    from overt.guard import install as files

    if runtime is not None and engine not in ("docker", "containerd"):
        raise click.UsageError(f"--runtime is for docker and containerd, not for {engine}")
    if default and engine != "docker":
        raise click.UsageError(f"--default is for docker, not for {engine}")
    _refuse_what_is_not_for(engine, bundle, directory)
    place = directory or Path(_ENGINES[engine])
    socket = str(_path(socket_path))
    wrapped = engines.Wrapped(socket, runtime)
    if engine == "podman":
        _make(lambda: files.into_podman(place, socket), dry_run, _NOT_GUARDED)
    elif engine == "docker":
        _make(lambda: engines.into_docker(place, wrapped, default=default), dry_run, _RELOAD, _NOT_GUARDED)
    elif engine == "containerd":
        _make(lambda: engines.into_containerd(place, wrapped), dry_run, _RESTART, _NOT_GUARDED)
    else:
        _make(lambda: files.into_bundle(_given(bundle), socket), dry_run)


@command.command()
@_ENGINE
@_BUNDLE
@_DIRECTORY
@_DRY_RUN
def uninstall(engine: str, bundle: Path | None, directory: Path | None, *, dry_run: bool) -> None:
    """Take back what `install` did."""
    from overt.guard import engines
    from overt.guard import install as files

    _refuse_what_is_not_for(engine, bundle, directory)
    place = directory or Path(_ENGINES[engine])
    if engine == "podman":
        _make(lambda: files.out_of_podman(place), dry_run, _STILL_GUARDED)
    elif engine == "docker":
        _make(lambda: engines.out_of_docker(place), dry_run, _RELOAD, _NO_RUNTIME)
    elif engine == "containerd":
        _make(lambda: engines.out_of_containerd(place), dry_run, _RESTART, _NO_RUNTIME)
    else:
        _make(lambda: files.out_of_bundle(_given(bundle)), dry_run)


@command.command()
@click.argument("engine", required=False)
@_SOCKET
@click.option(
    "--runtime", metavar="NAME",
    help="docker, podman: the runtime of this name in place of the default; containerd: this program.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the steps as JSON.")
def check(engine: str | None, socket_path: str | None, runtime: str | None, *, as_json: bool) -> int:
    """Run a container on a disk that loses a write, and see whether it is told.

    ENGINE is podman, docker, containerd, runc or crun; by default one that the guard is installed into.

    Exit status 0: it is protected; 1: it is not; 3: that could not be found out (the container did not start, say).
    """
    from overt.guard import check as checks
    from overt.guard import runners
    from overt.guard.engines import InstallError

    try:
        engine = engine or runners.installed()
    except InstallError as error:
        raise click.ClickException(f"{error} (name the engine to check)") from None
    if engine is None:
        raise click.ClickException(f"none of {', '.join(runners.ENGINES)} is installed")
    if engine not in runners.ENGINES:
        raise click.UsageError(f"no engine {engine!r}: there are {', '.join(runners.ENGINES)}")
    if os.geteuid() != 0:
        raise click.ClickException("a check mounts an overlay and makes a disk: it needs root")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as by nohup(1)
            signal.signal(number, _end)
    report = checks.check(engine, _path(socket_path), runtime)
    if as_json:
        steps = [step._asdict() for step in report.steps]
        click.echo(json.dumps({"engine": engine, "protected": report.protected, "steps": steps}, indent=2))
    else:
        for step in report.steps:
            click.echo(f"{ {True: 'yes', False: 'NO', None: '?'}[step.ok]:4}{step.name}: {step.why}")
        found = {True: "protected", False: "NOT PROTECTED", None: "could not be found out"}[report.protected]
        click.echo(f"{engine}: {found}")
        if not report.steps[0].ok:
            click.echo("start a guard: overt guard run, or systemctl start overt-guard")
    return {True: 0, False: 1, None: _UNKNOWN}[report.protected]


def _end(number: int, _: object) -> NoReturn:
    """Let what was made be taken away, as after Ctrl-C, and undisturbed."""
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _refuse_what_is_not_for(engine: str, bundle: Path | None, directory: Path | None) -> None:
    if bundle is not None and engine != "bundle":
        raise click.UsageError(f"{engine} takes no directory of a bundle (--directory names its configuration's)")
    if directory is not None and engine == "bundle":
        raise click.UsageError("--directory is not for bundle, whose directory is an argument")


def _given(bundle: Path | None) -> Path:
    if bundle is None:
        raise click.UsageError("which bundle?")
    return bundle


def _make(work_out: "Callable[[], list[Change]]", dry_run: bool, *then: str) -> None:
    """Make changes, or show them; `then`: what is said when they are made, of what there is left to do."""
    from overt.guard.engines import InstallError
    from overt.guard.profile import ProfileError

    try:
        changes = work_out()
    except (InstallError, ProfileError) as error:
        raise click.ClickException(str(error)) from None
    made = []
    try:
        for change in changes:
            if dry_run:
                click.echo(f"would {change}\n{change.diff()}")
            else:
                change.make(durable=True)
                made.append(change)
    finally:  # a standard output that is full or gone does not leave half of them made
        for change in made:
            click.echo(str(change))
    if not changes:
        click.echo("nothing to do")
    elif not dry_run:
        for each in then:
            click.echo(f"then: {each}")
