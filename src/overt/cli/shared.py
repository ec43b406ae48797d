"""The server that many mounts share, for callers that know nothing of servers: podman, buildah, mount(8)."""

import os

from overt.cli.report import complain
from overt.overlay.options import Options
from overt.server import registry
from overt.server.client import Client, ServerError

VARIABLE = "OVERT_SERVER"
"""a socket; set and empty: no sharing"""


def mount(options: Options, target: str, socket: str | None = None) -> int | None:
    """Have a shared server hold the mount; the exit status, or None if there is none and it is not insisted on.

    It is the one behind `socket`, or behind $OVERT_SERVER, or else the machine's (registry.well_known).
    """
    named = socket or os.environ.get(VARIABLE)
    if named == "":
        return None
    path = named or str(registry.well_known())
    if named is None and not registry.answers(registry.well_known()):
        return None
    try:
        with Client(path) as client:
            if not client.same_mounts:
                if named is None:  # a container engine with a namespace of its own, say
                    return None
                raise ServerError(f"{path}: this server is in another mount namespace: start one in this one", 1)
            for line in client.mount(target, options):
                complain(f"overt: {target}", line)
    except ServerError as error:
        complain("overt", str(error))
        return error.status
    return 0
