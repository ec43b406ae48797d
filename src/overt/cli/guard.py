"""overt guard: a truthful syncfs(2) for stock containers on the kernel's overlayfs."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overt.cli.serve import notify_systemd

if TYPE_CHECKING:
    from overt.guard.install import Change

_SOCKET = click.option(
    "--socket", "socket_path", metavar="PATH", help="The guard's socket (default: /run/overt/guard.sock)."
)


_DIRECTORY = click.option(
    "--directory", metavar="DIR", type=click.Path(path_type=Path), default="/etc/containers", show_default=True,
    help="Where podman's configuration is.",
)  # fmt: skip
_DRY_RUN = click.option("--dry-run", is_flag=True, help="Show what would be changed, and change nothing.")


@click.group()
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
    from overt.guard import supervisor

    supervisor.prepare()
    guard = supervisor.Supervisor(_path(socket_path), Events(foreground=foreground), blame)
    if ready_fd is not None:
        os.write(ready_fd, b"\n")
        os.close(ready_fd)
    notify_systemd("READY=1")
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
        click.echo(f"  {each['id']}  pid {each['pid']}, {each['overlays']} overlays, {each['calls']} calls")
    for overlay in state["overlays"]:
        trouble = f"  errors {overlay['errors']}, told {overlay['told']}, owed to {overlay['owed']}"
        click.echo(
            f"  {overlay['upperdir']}{trouble if overlay['errors'] else ''}"
            f"{'' if overlay['guarded'] else '  NOT GUARDED'}"
        )
    for upper in state["uppers"]:
        click.echo(f"  upper {upper['device']}: sees by {upper['eyes']}, {upper['flushes']} flushes")
        for error in upper["errors"]:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(error["when"]))
            taken = ", taken from the host" if error["taken"] else ""
            what = f"error {error['number']}: {os.strerror(error['errno'])}"
            click.echo(f"    {what}, {when}, by {error['source']}{taken}; told in {error['told']} overlays")
            for each in error["lost"]:
                where = f"{each['container']} ({each['image']})" if each["image"] else each["container"]
                click.echo(f"      {'lost' if each['certain'] else 'perhaps lost'}: {each['path']} in {where}")


@command.command()
@_SOCKET
@click.option(
    "--from", "base", metavar="FILE",
    help="A profile to start from, or an OCI config.json (default: one that filters nothing else).",
)  # fmt: skip
def profile(socket_path: str | None, base: str | None) -> None:
    """Print a seccomp profile in which syncfs(2) is the guard's to answer.

    For podman: --security-opt seccomp=FILE, or seccomp_profile in containers.conf. For runc and crun: linux.seccomp in
    config.json.
    """
    from overt.guard import profile as profiles

    try:
        made = profiles.make(profiles.load(base), str(_path(socket_path)))
    except profiles.ProfileError as error:
        raise click.ClickException(str(error)) from None
    click.echo(json.dumps(made, indent=2))


@command.command()
@click.argument("runtime", type=click.Choice(["podman", "bundle"]))
@click.argument("bundle", type=click.Path(file_okay=False, exists=True, path_type=Path), required=False)
@_SOCKET
@_DIRECTORY
@_DRY_RUN
def install(
    runtime: str, bundle: Path | None, socket_path: str | None, directory: Path, *, dry_run: bool
) -> None:  # fmt: skip
    """Have podman, or an OCI bundle of runc or crun, hand syncfs(2) to the guard.

    It holds for containers that are started afterwards. Without a guard that runs they do not start.
    """
    from overt.guard import install as changes

    socket = str(_path(socket_path))
    _make(lambda: changes.into_podman(directory, socket) if runtime == "podman"
          else changes.into_bundle(_given(bundle), socket), dry_run)  # fmt: skip


@command.command()
@click.argument("runtime", type=click.Choice(["podman", "bundle"]))
@click.argument("bundle", type=click.Path(file_okay=False, exists=True, path_type=Path), required=False)
@_DIRECTORY
@_DRY_RUN
def uninstall(runtime: str, bundle: Path | None, directory: Path, *, dry_run: bool) -> None:
    """Take back what `install` did."""
    from overt.guard import install as changes

    _make(lambda: changes.out_of_podman(directory) if runtime == "podman"
          else changes.out_of_bundle(_given(bundle)), dry_run)  # fmt: skip


def _given(bundle: Path | None) -> Path:
    if bundle is None:
        raise click.UsageError("which bundle?")
    return bundle


def _make(work_out: "Callable[[], list[Change]]", dry_run: bool) -> None:
    from overt.guard.profile import ProfileError

    try:
        changes = work_out()
    except ProfileError as error:
        raise click.ClickException(str(error)) from None
    for change in changes:
        click.echo(f"{'would ' if dry_run else ''}{change}")
        if not dry_run:
            change.make()
    if not changes:
        click.echo("nothing to do")
