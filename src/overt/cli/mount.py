"""overt mount: one overlay, served by a process of its own or by a server that runs already."""

import click
from click.core import ParameterSource

from overt.cli.background import in_background, in_foreground
from overt.cli.report import complain
from overt.overlay.options import OptionError, parse
from overt.server.client import Client, ServerError

_OPTIONS_HELP = (
    "Comma-separated, as for mount(8): lowerdir=A:B, lowerdir+=, datadir+=, upperdir=, workdir=, ro, volatile, "
    "fsync=auto|strict|volatile, unseen=record|refuse, redirect_dir=on|follow|nofollow|off, metacopy=on|off, "
    "index=on|off, whiteouts=overlay|oci, xino=on|auto|off, nopassthrough, userxattr, nosuid, nodev, noexec, "
    "nosymfollow, noatime, nodiratime, strictatime; uidmapping=, gidmapping=, squash_to_root, squash_to_uid=, "
    "squash_to_gid=, static_nlink, noacl, noxattrs=1, timeout=, context= as for fuse-overlayfs."
)


@click.command()
@click.option("-o", "options", multiple=True, required=True, metavar="OPTIONS", help=_OPTIONS_HELP)
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground; events go to standard error.")
@click.option(
    "--server",
    metavar="SOCKET",
    envvar="OVERT_SERVER",
    help="Have the server behind SOCKET (overt serve) hold the mount.",
)
@click.argument("target", metavar="MNT")
def command(options: tuple[str, ...], target: str, *, foreground: bool, server: str | None) -> int:
    """Mount an overlay at MNT.

    Returns when the mount is live. Unmount with `overt umount MNT`, which also says whether data was lost.
    """
    if not target:
        raise click.UsageError("MNT is empty")
    if foreground and server:
        if click.get_current_context().get_parameter_source("server") is ParameterSource.COMMANDLINE:
            raise click.UsageError("--foreground is for a server of its own: it contradicts --server")
        server = None
    text = ",".join(options)
    try:
        parsed = parse(text).absolute()
        if server:
            with Client(server) as client:
                notices = client.mount(target, text)
            for line in notices:
                complain(f"overt: {target}", line)
            return 0
    except OptionError as error:
        raise click.UsageError(str(error), click.get_current_context()) from None
    except ServerError as error:
        complain("overt", str(error))
        return error.status
    if foreground:
        return in_foreground(parsed, target)
    return in_background(parsed, target)
