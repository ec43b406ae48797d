"""overt serve: one process for many mounts."""

import os
from pathlib import Path

import click


@click.command()
@click.option("--socket", metavar="SOCKET", help="Listen here (default: /run/overt/PID.sock).")
@click.option("-f", "--foreground", is_flag=True, help="Events go to standard error instead of syslog.")
@click.option("--ready-fd", type=int, metavar="FD", help="Write a byte to this descriptor when ready, and close it.")
def command(socket: str | None, ready_fd: int | None, *, foreground: bool) -> int:
    """Hold many mounts behind a unix socket: `overt mount --server SOCKET` adds one.

    SIGTERM unmounts them all and ends the server.
    """
    from overt.server.main import serve

    def ready() -> None:
        if ready_fd is not None:
            os.write(ready_fd, b"\n")
            os.close(ready_fd)

    return serve(foreground=foreground, socket=Path(socket) if socket else None, ready=ready)
