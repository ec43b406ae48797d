"""A server process from its start to its end."""

import contextlib
import gc
import math
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from overt.events import Events
from overt.host import process
from overt.server import registry
from overt.server.control import Control
from overt.server.identity import become_myself
from overt.server.layers import Refusal
from overt.server.service import Service
from overt.server.watchdog import PATIENCE, Watchdog

_LAST_REQUESTS = 3.0
"""seconds for the kernel to say that unmounted mounts are gone"""
_PAUSE = 0.1
"""seconds between two attempts at what takes a thread, where there are none"""
_AGAIN = 1.0
"""seconds until a server that was to end tries to, likewise"""

# What serving takes: mounts, loop devices, passthrough and trusted xattrs (sys_admin); files of any owner; whiteouts;
# open by handle; the caller's descriptor and its namespace; the first place in a line (sys_nice,
# server/reopening.py). Not sys_resource: quotas and reserved blocks hold for us
# too.
CAPABILITIES = {
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "mknod", "setfcap", "setgid", "setuid",
    "sys_admin", "sys_chroot", "sys_nice", "sys_ptrace",
}  # fmt: skip


def serve(
    *, foreground: bool, first: Callable[[Service], None] | None = None, socket: Path | None = None,
    ready: Callable[[], None] = lambda: None, watchdog: Watchdog | None = None,
) -> int:  # fmt: skip
    """Run a server in this process until it is told to stop; return the exit status.

    `first` is called, on a thread of its own, to make the mount for which this server exists; the server ends with its
    last mount then. Without `first` it serves until SIGTERM. `socket`: where to listen, beside the registry.
    `watchdog`: one that was forked already. `ready` tells whoever waits for the server; an OSError of it, or of
    `first`, is raised here when the server has ended, and has unmounted what it had mounted until then.
    """
    _raise_limits()
    process.make_room_for_descriptors()
    gc.set_threshold(50_000, 20, 100)  # nodes are many, and dropped by count; walking them all often would cost more
    events = Events(foreground=foreground)
    watchdog = watchdog or Watchdog(foreground=foreground)
    if os.geteuid() == 0:
        process.keep_capabilities_across_setfsuid()
        process.keep_capabilities(CAPABILITIES)
    process.outlive_mount_namespace()
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    service = Service(events, watchdog, min(descriptors // 4, 1 << 16))
    engine = service.engine

    _answer_watchdog(service, watchdog)
    for place in registry.clear_dead():
        events.say("cleared a dead mount", mount=place)

    status = 0
    failure: OSError | None = None
    ending = threading.Lock()

    def end() -> None:
        if not ending.acquire(blocking=False):
            return
        try:
            process.start(threading.Thread(target=finish, daemon=True))
        except OSError as error:  # no more threads: whoever has asked does not ask twice
            ending.release()
            events.say("does not end yet", why=str(error))
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)

    def finish() -> None:
        nonlocal status
        become_myself()
        with contextlib.ExitStack() as last:
            last.callback(engine.stop)
            last.callback(service.let_go)
            for problem in service.close():
                events.say("busy", why=problem)
                status = 1
            service.empty.wait(_LAST_REQUESTS)

    own = registry.directory() / f"{os.getpid()}.sock"
    control = Control(service, socket or own, end)
    if socket is not None:
        own.unlink(missing_ok=True)
        own.symlink_to(socket.absolute())
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # somebody opens what we have a lease on (server/attributes.py)
    signal.set_wakeup_fd(engine.bell, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, lambda *_: end())

    def begin() -> None:
        nonlocal failure
        try:
            if first is not None:
                first(service)
            ready()
        except (Refusal, OSError) as error:
            failure = error if isinstance(error, OSError) else None
            end()
            return
        if first is not None:
            service.empty.wait()
            engine.stop()

    try:
        engine.start()  # first: whoever hears that we are ready may ask at once
        process.start(threading.Thread(target=begin, daemon=True))
        engine.wait()
    except OSError as error:  # no threads
        failure = error
    service.abort()
    control.close()
    own.unlink(missing_ok=True)
    service.uppers.close()
    watchdog.close()
    if failure is not None:
        raise failure
    return status


def _answer_watchdog(service: Service, watchdog: Watchdog) -> None:
    """Give the watchdog signs of life, and start another one where it has ended: somebody has killed it."""
    engine, events = service.engine, service.events
    renewed = -math.inf

    def live() -> None:
        if watchdog.answer(engine.leader):
            service.give_up(PATIENCE)
            return
        engine.forget(watchdog.fd)
        try:
            process.start(threading.Thread(target=renew, daemon=True))
        except OSError:  # no more threads: once more, and not so fast
            time.sleep(_PAUSE)
            engine.watch(watchdog.fd, live)

    def renew() -> None:
        nonlocal renewed
        become_myself()
        events.say("the watchdog has ended: another one is started")
        while True:
            time.sleep(max(0.0, renewed + watchdog.period - time.monotonic()))
            renewed = time.monotonic()
            try:
                watchdog.renew()
            except OSError as error:
                events.say("no watchdog", why=str(error))
            else:
                engine.watch(watchdog.fd, live)
                return

    engine.watch(watchdog.fd, live)


def _raise_limits() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    for limit in ((most, most), (hard, hard)):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            return
        except (OSError, ValueError):
            continue  # without CAP_SYS_RESOURCE the hard limit is what there is
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
