"""Bringing the metrics (guard/metrics.py) to Prometheus: by HTTP, in a file, or once as text."""

import signal
from pathlib import Path

import prometheus_client

from overt.guard.metrics import Guard

_PERIOD = 15.0
"""seconds between two writings of a file"""
_ENDING = {signal.SIGTERM, signal.SIGINT}


def registry(socket: Path) -> prometheus_client.CollectorRegistry:
    """The metrics of the guard that listens on `socket`."""
    made = prometheus_client.CollectorRegistry(auto_describe=False)
    made.register(Guard(socket))
    return made


def text(socket: Path) -> str:
    """The metrics, now."""
    return bytes(prometheus_client.generate_latest(registry(socket))).decode()


def serve(socket: Path, address: str) -> None:
    """Answer HTTP on `address` (HOST:PORT, [::1]:PORT, :PORT) until SIGTERM or SIGINT. ValueError, OSError."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"no address and port: {address}")
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    prometheus_client.start_http_server(int(port), host.strip("[]") or "0.0.0.0", registry(socket))
    signal.sigwait(_ENDING)


def write(socket: Path, path: Path) -> None:
    """Write `path`, in one piece, again and again until SIGTERM or SIGINT. OSError.

    It is removed then, so that nobody reads what is no longer so.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    made = registry(socket)
    try:
        while True:
            prometheus_client.write_to_textfile(str(path), made)
            if signal.sigtimedwait(_ENDING, _PERIOD) is not None:
                return
    finally:
        path.unlink(missing_ok=True)
