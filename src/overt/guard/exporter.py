"""Bringing the metrics (guard/metrics.py) to Prometheus: by HTTP, in a file, or once as text."""

import errno
import signal
import stat
from pathlib import Path

import prometheus_client

from overt.guard.metrics import Guard

_PERIOD = 15.0
"""seconds between two writings of a file"""
_OURS = b"# HELP overt_guard_"
"""how a file of metrics of a guard begins"""
_ENDING = {signal.SIGTERM, signal.SIGINT}


def registry(socket: Path) -> prometheus_client.CollectorRegistry:
    """The metrics of the guard that listens on `socket`."""
    made = prometheus_client.CollectorRegistry(auto_describe=False)
    made.register(Guard(socket))
    return made


def text(socket: Path) -> str:
    """The metrics, now."""
    return bytes(prometheus_client.generate_latest(registry(socket))).decode()


def serve(socket: Path, host: str, port: int) -> None:
    """Answer HTTP until SIGTERM or SIGINT. OSError.

    `host`: empty for all addresses, of IPv6 as well where the machine has it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    made = registry(socket)
    try:
        if host or not _everywhere(port, made):
            prometheus_client.start_http_server(port, host.strip("[]") or "0.0.0.0", made)
    except OSError as error:
        why = f"cannot listen, {error.strerror} (name another HOST:PORT)"
        raise OSError(error.errno, why, f"{host}:{port}") from None
    signal.sigwait(_ENDING)


def _everywhere(port: int, made: prometheus_client.CollectorRegistry) -> bool:
    """Answer on all addresses by a socket that takes IPv4 as well; False if there is no IPv6."""
    try:
        prometheus_client.start_http_server(port, "::", made)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise
        return False
    return True


def write(socket: Path, path: Path) -> None:
    """Write `path`, in one piece, again and again until SIGTERM or SIGINT. OSError.

    It is removed then, so that nobody reads what is no longer so. A file that no guard's metrics are in is left alone.
    """
    _check(path)
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    made = registry(socket)
    try:
        while True:
            _write(path, made)
            if signal.sigtimedwait(_ENDING, _PERIOD) is not None:
                return
    finally:
        path.unlink(missing_ok=True)


def _write(path: Path, made: prometheus_client.CollectorRegistry) -> None:
    try:
        prometheus_client.write_to_textfile(str(path), made)
    except OSError as error:  # it names the file that it writes first
        raise OSError(error.errno, f"cannot be written, {error.strerror}", str(path)) from None


def _check(path: Path) -> None:
    """FileExistsError if something else is at `path` than what this writes there."""
    try:
        ours = stat.S_ISREG(path.lstat().st_mode) and path.read_bytes().startswith(_OURS)
    except FileNotFoundError:
        return
    if not ours:
        why = "it is there already, and holds no metrics of a guard (name a file of its own)"
        raise FileExistsError(errno.EEXIST, why, str(path))
