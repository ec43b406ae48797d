"""A mount with a server of its own, in the background or not."""

import json
import os
import select
import sys
import threading
import traceback
from typing import Any

from overt.cli.report import complain, describe
from overt.events import leave
from overt.overlay.options import Options

_CLEARING_UP = 10.0
"""seconds"""


def _say(result: dict[str, Any]) -> None:
    if "error" in result:
        complain("overt", result["error"])
    for line in result.get("notices", []):
        complain(f"overt: {result['target']}", line)


def in_foreground(options: Options, target: str) -> int:
    """Serve the mount in this process until it ends; the exit status."""
    return _serve(options, target, os.path.abspath(target), _say, foreground=True)


class _Unheard(BrokenPipeError):
    """Whoever gave the command does not wait for the answer any more."""


def in_background(options: Options, target: str) -> int:
    """Fork the server, and wait until it has mounted or said why not; the exit status."""
    reading, writing = os.pipe()
    server = os.fork()
    if server == 0:
        status = 1
        reported = False
        try:
            os.close(reading)
            os.setsid()
            place = os.path.abspath(target)
            os.chdir("/")

            def report(result: dict[str, Any]) -> None:
                nonlocal reported
                reported = True
                try:
                    os.write(writing, json.dumps(result).encode())
                except BrokenPipeError as error:
                    raise _Unheard(error.errno, error.strerror) from None
                os.close(writing)
                _let_go_of_terminal()

            try:
                status = _serve(options, target, place, report, foreground=False)
            except _Unheard:
                raise
            except OSError as error:
                if reported:
                    raise
                report({"error": describe(error), "status": 1})
        except (_Unheard, KeyboardInterrupt):
            pass  # whoever gave the command has ended it: what it had mounted is unmounted by now
        except BaseException:  # nobody above may see it: this is the child of a fork
            traceback.print_exc()
        finally:
            leave(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    result = json.loads(answer or '{"error": "the server ended before it had mounted", "status": 1}')
    _say(result)
    if "error" in result:
        _wait_for(server)
    return int(result.get("status", 0))


def _wait_for(server: int) -> None:
    """Let a server that could not mount clear up first; not for ever, a disk may hang."""
    pidfd = os.pidfd_open(server)
    try:
        if select.select([pidfd], [], [], _CLEARING_UP)[0]:
            os.waitpid(server, 0)
    finally:
        os.close(pidfd)


def _let_go_of_terminal() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def _serve(options: Options, target: str, place: str, report: Any, *, foreground: bool) -> int:
    """Serve a mount at `place`, which is called `target`, until it ends; the exit status."""
    from overt.server.watchdog import Watchdog

    # Forked before the server's own modules are there: it needs none of them, and would keep the pages they are in.
    watchdog = Watchdog(foreground=foreground)

    from overt.server.layers import Refusal
    from overt.server.main import serve
    from overt.server.service import Service

    failed = threading.Event()

    def first(service: Service) -> None:
        try:
            notices = service.mount(options, place)
        except Refusal as error:
            failed.set()
            report({"error": str(error), "status": 1})
            raise
        except OSError as error:
            failed.set()
            named = error.filename if isinstance(error.filename, str) else ""
            report({"error": f"{named if os.path.isabs(named) else place}: {error.strerror}", "status": 1})
            raise Refusal(str(error)) from None
        report({"notices": notices, "target": target})

    status = serve(foreground=foreground, first=first, watchdog=watchdog)
    sys.stdout.flush()
    return 1 if failed.is_set() else status
