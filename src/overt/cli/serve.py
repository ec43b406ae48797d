"""overt serve: one process for many mounts."""

import os
import socket
from pathlib import Path

import click


def notify_systemd(state: str) -> None:
    """sd_notify(3): tell systemd, if it has started us (Type=notify)."""
    name = os.environ.get("NOTIFY_SOCKET")
    if name:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.sendto(state.encode(), "\0" + name[1:] if name.startswith("@") else name)


@click.command()
@click.option("--socket", "path", metavar="SOCKET", help="Listen here (default: /run/overt/PID.sock).")
@click.option("-f", "--foreground", is_flag=True, help="Events go to standard error instead of syslog.")
@click.option("--ready-fd", type=int, metavar="FD", help="Write a byte to this descriptor when ready, and close it.")
def command(path: str | None, ready_fd: int | None, *, foreground: bool) -> int:
    """Hold many mounts behind a unix socket: `overt mount --server SOCKET` adds one.

    SIGTERM unmounts them all and ends the server.
    """
    from overt.server.main import serve

    def ready() -> None:
        if ready_fd is not None:
            os.write(ready_fd, b"\n")
            os.close(ready_fd)
        notify_systemd("READY=1")

    return serve(foreground=foreground, socket=Path(path) if path else None, ready=ready)
