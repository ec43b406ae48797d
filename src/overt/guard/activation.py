"""Sockets that systemd has opened for us (sd_listen_fds(3)).

Runtimes can connect before the guard runs, and while it is replaced; what they say waits.
"""

import os
import socket

_FIRST = 3
"""SD_LISTEN_FDS_START"""


def sockets() -> dict[str, socket.socket]:
    """The listening unix sockets that were handed to this process, by their paths; those of a parent's are not taken.

    Raises ValueError if one is something else.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "0")
    os.environ.pop("LISTEN_FDNAMES", None)
    found: dict[str, socket.socket] = {}
    if pid != str(os.getpid()):
        return found
    for fd in range(_FIRST, _FIRST + int(count)):
        os.set_inheritable(fd, False)
        each = socket.socket(fileno=fd)
        if each.family != socket.AF_UNIX or not each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ValueError(f"descriptor {fd} from systemd is no listening unix socket")
        found[str(each.getsockname())] = each
    return found
