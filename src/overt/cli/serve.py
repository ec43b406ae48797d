"""overt serve: one process for many mounts."""

import os
import socket
from pathlib import Path

import click


def tell_ready(fd: int | None) -> None:
    """Write a byte to `fd`, if there is one, and close it; and tell systemd, if it has started us (sd_notify(3)).

    OSError naming whom it could not tell.
    """
    whom = f"--ready-fd {fd}"
    name = os.environ.get("NOTIFY_SOCKET")
    try:
        if fd is not None:
            os.write(fd, b"\n")
            os.close(fd)
        if name:
            whom = f"NOTIFY_SOCKET={name}"
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                manager.sendto(b"READY=1", "\0" + name[1:] if name.startswith("@") else name)
    except OSError as error:
        raise OSError(error.errno, f"{whom}: {error.strerror or error}") from None


@click.command()
@click.option("--socket", "path", metavar="SOCKET", help="Listen here (default: /run/overt/PID.sock).")
@click.option("-f", "--foreground", is_flag=True, help="Events go to standard error instead of syslog.")
@click.option("--ready-fd", type=int, metavar="FD", help="Write a byte to this descriptor when ready, and close it.")
def command(path: str | None, ready_fd: int | None, *, foreground: bool) -> int:
    """Hold many mounts behind a unix socket: `overt mount --server SOCKET` adds one.

    SIGTERM unmounts them all and ends the server.
    """
    from overt.server.main import serve

    return serve(foreground=foreground, socket=Path(path) if path else None, ready=lambda: tell_ready(ready_fd))
