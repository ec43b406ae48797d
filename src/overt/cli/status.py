"""overt status: what runs, and what went wrong."""

import json
import os
import time
from typing import Any

import click

from overt.printable import printable
from overt.server import registry
from overt.server.client import Client, ServerError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--events", is_flag=True, help="Print the latest events, one JSON object a line.")
def command(*, as_json: bool, events: bool) -> int:
    """Show mounts, uppers and the errors they recorded, of all servers."""
    servers = []
    for path in registry.sockets():
        try:
            with Client(path) as client:
                if events:
                    for event in client.events():
                        click.echo(json.dumps(event))
                    continue
                servers.append(client.status())
        except ServerError as error:
            click.echo(f"overt: {path}: {error}", err=True)
        except OSError:
            continue  # a socket that a killed server left; `dead` below shows its mounts
    dead = [entry._asdict() for entry in registry.entries() if entry.dead]
    if events:
        return 0
    if as_json:
        click.echo(json.dumps({"servers": servers, "dead": dead}, indent=2))
        return 0
    if not servers and not dead:
        click.echo("no overt server is running")
    for server in servers:
        _show(server)
    for entry in dead:
        place = printable(entry["target"])
        click.echo(f"{place}  dead: its server {entry['pid']} is gone (overt umount clears it away)")
    return 0


def _show(server: dict[str, Any]) -> None:
    click.echo(f"server {server['pid']}: {len(server['mounts'])} mounts")
    for mount in server["mounts"]:
        how = [f"fsync={mount['fsync']}", mount["kind"]]
        how.append("passthrough" if mount["passthrough"] else "no passthrough")
        if not mount["syncfs"]:
            how.append("syncfs not delivered")
        trouble = f"  errors {mount['errors']}, told {mount['told']}" if mount["errors"] else ""
        click.echo(f"  {printable(mount['target'])}  {', '.join(how)}{trouble}")
        for name in mount["lost"]:
            click.echo(f"    lost: {printable(name)}")
        if mount["lost_files"] > len(mount["lost"]):
            click.echo(f"    lost: these are the latest of {mount['lost_files']} files")
    for upper in server["uppers"]:
        click.echo(f"  upper {upper['device']}: sees by {upper['eyes']}, {upper['flushes']} flushes")
        if upper["recorded"] > len(upper["errors"]):
            click.echo(f"    {upper['recorded']} errors, the latest {len(upper['errors'])} of them:")
        for error in upper["errors"]:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(error["when"]))
            taken = ", taken from the host" if error["taken"] else ""
            told = f"told to {len(error['told'])} of {sum(1 for _ in server['mounts'])} mounts"
            what = f"error {error['number']}: {os.strerror(error['errno'])}"
            click.echo(f"    {what}, {when}, by {error['source']}{taken}; {told}")
