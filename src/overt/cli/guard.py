"""overt guard: a truthful syncfs(2) for stock containers on the kernel's overlayfs."""

import json
import os
import time
from pathlib import Path
from typing import Any

import click

from overt.cli.serve import notify_systemd

_SOCKET = click.option(
    "--socket", "socket_path", metavar="PATH", help="The guard's socket (default: /run/overt/guard.sock)."
)


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
def run(socket_path: str | None, ready_fd: int | None, *, foreground: bool) -> None:
    """Guard the containers whose profile names the socket as its listenerPath.

    SIGTERM ends it; containers that still run get ENOSYS from syncfs(2) from then on.
    """
    from overt.events import Events
    from overt.guard import supervisor

    supervisor.raise_limits()
    guard = supervisor.Supervisor(_path(socket_path), Events(foreground=foreground))
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
