"""overt umount: the end of a mount, and what is known of its data."""

import json
import os
from typing import Any

import click

from overt.host import mounts
from overt.printable import printable
from overt.server import registry
from overt.server.client import Client, ServerError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@click.argument("target", metavar="MNT")
def command(target: str, *, as_json: bool) -> int:
    """Unmount MNT, and say whether data was lost.

    An ordinary mount is flushed. Exit status: 0 no error was recorded; 3 data is lost or may be lost, or the mount
    lives on in another place; 1 it could not be unmounted.
    """
    if not target:
        raise click.UsageError("MNT is empty")
    place = os.path.abspath(target)
    entry = registry.owner(place)
    real = os.path.realpath(place)
    dead = registry.is_dead_mount(real) if entry is None else entry.dead  # a server elsewhere may have taken the entry
    if dead:
        if entry is None or registry.mounted(entry):
            mounts.umount(real if entry is None else entry.target, mounts.MNT_DETACH)
        if entry is not None:
            registry.remove(entry.file)
        server = "its server" if entry is None else f"its server {entry.pid}"
        click.echo(f"overt: {target}: {server} was dead: cleared away; what it had not flushed may be lost", err=True)
        return 3
    if entry is None:
        what = "not an overt mount"
        if registry.is_mount(real):
            what = "another place of an overt mount: take it away with umount(8)"
            if os.geteuid():
                what = "not a mount of a server of yours: be root"
        click.echo(f"overt: {target}: {what}", err=True)
        return 1
    try:
        with Client(registry.directory() / f"{entry.pid}.sock") as client:
            record = client.umount(entry.target)
    except ServerError as error:
        click.echo(f"overt: {error}", err=True)
        return 1
    try:
        click.echo(json.dumps(record) if as_json else _words(record))
    except OSError as error:
        raise OSError(error.errno, f"{target}: unmounted; standard output: {error.strerror}") from None
    return 0 if record["verdict"] == "no error recorded" else 3


def _words(record: dict[str, Any]) -> str:
    text = str(record["verdict"])
    if record.get("files"):
        text += ": " + ", ".join(map(printable, record["files"])) + " and perhaps more" * record["perhaps_more"]
    if record.get("elsewhere") and "elsewhere" not in text:
        text += " (still mounted elsewhere)"
    if record["volatile"]:
        text += " (volatile: nothing was flushed)"
    return text
