"""overt status: what runs, and what went wrong."""

import json
import os
import time
from typing import Any

import click

from overt.cli.report import OutputError, complain
from overt.printable import printable
from overt.server import registry
from overt.server.client import Client, ServerError

_PATIENCE = 10.0
"""seconds for a server to answer: it says what it knows, and hardly ever waits for a disk"""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--events", is_flag=True, help="Print the latest events, one JSON object a line.")
def command(*, as_json: bool, events: bool) -> int:
    """Show mounts, uppers and the errors they recorded, of all servers.

    Exit status: 0, or 1 if a server does not answer.
    """
    servers = []
    status = 0
    for path in registry.sockets():
        try:
            with Client(path, _PATIENCE) as client:
                if events:
                    for event in client.events():
                        click.echo(json.dumps(event))
                    continue
                servers.append(client.status())
        except ServerError as error:
            complain("overt", f"{path}: {error}")
            status = 1
        except TimeoutError:
            complain("overt", f"server {path.stem}: no answer within {_PATIENCE:g} s")
            status = 1
        except OutputError:
            raise
        except OSError:
            continue  # a socket that a killed server left; `dead` below shows its mounts
    dead: list[dict[str, Any]] = [entry._asdict() for entry in registry.entries() if entry.dead]
    dead += [{"file": None, "device": None, "pid": None, "target": place} for place in registry.unknown_dead()]
    if events:
        return status
    if as_json:
        click.echo(json.dumps({"servers": servers, "dead": dead}, indent=2))
        return status
    if not servers and not dead and not status:
        nothing = "no overt server of yours is running; for root's, be root"
        click.echo(nothing if os.geteuid() else "no overt server is running")
    for server in servers:
        _show(server)
    for mount in dead:
        gone = "its server" if mount["pid"] is None else f"its server {mount['pid']}"
        click.echo(f"{printable(mount['target'])}  dead: {gone} is gone (overt umount clears it away)")
    return status


def _show(server: dict[str, Any]) -> None:
    count = len(server["mounts"])
    elsewhere = "" if _is_here(server["pid"]) else f", in another mount namespace (kill {server['pid']} unmounts)"
    click.echo(f"server {server['pid']}: {count} mount{'s' * (count != 1)}{elsewhere}")
    for mount in server["mounts"]:
        how = [f"fsync={mount['fsync']}", mount["kind"]]
        how.append("passthrough" if mount["passthrough"] else "no passthrough")
        if not mount["syncfs"] and mount["upper"]:
            how.append("syncfs not delivered")
        trouble = f"  errors {mount['errors']}, told {mount['told']}" if mount["errors"] else ""
        click.echo(f"  {printable(mount['target'])}  {', '.join(how)}{trouble}")
        for name in mount["lost"]:
            click.echo(f"    lost: {printable(name)}")
        if mount["lost_files"] > len(mount["lost"]):
            click.echo(f"    lost: these are the latest of {mount['lost_files']} files")
    for upper in server["uppers"]:
        click.echo(f"  upper {upper['device']}: sees by {upper['eyes']}, {upper['flushes']} flushes")
        # A server that has outlived an upgrade says of no mount on which upper it is.
        mounts = sum(mount.get("device", upper["device"]) == upper["device"] for mount in server["mounts"])
        if upper["recorded"] > len(upper["errors"]):
            click.echo(f"    {upper['recorded']} errors, the latest {len(upper['errors'])} of them:")
        for error in upper["errors"]:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(error["when"]))
            taken = ", taken from the host" if error["taken"] else ""
            told = f"told to {len(error['told'])} of {mounts} mounts"
            what = f"error {error['number']}: {os.strerror(error['errno'])}"
            click.echo(f"    {what}, {when}, by {error['source']}{taken}; {told}")


def _is_here(pid: int) -> bool:
    """Whether a server's mounts are those of our mount namespace; so it is taken to be where that cannot be known."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
    except OSError:
        return True
