"""The guard's status as Prometheus reads it.

A process of its own asks for the status at each scrape. So the guard, which has capabilities and reads what containers
write, has no HTTP server; and that it does not answer is a metric as well. Needs prometheus_client (the extra
`metrics`; Debian: python3-prometheus-client).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from overt.guard import supervisor


class Guard(Collector):
    """What to register with a prometheus_client registry: the guard that listens on `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def collect(self) -> Iterator[Metric]:
        """The metrics, now."""
        try:
            state = supervisor.ask(self.path)
        except OSError:
            yield GaugeMetricFamily("overt_guard_up", "Whether the guard answers.", 0)
            return
        yield GaugeMetricFamily("overt_guard_up", "Whether the guard answers.", 1)
        yield from families(state)


def families(state: dict[str, Any]) -> Iterator[Metric]:
    """The metrics in a status (guard/status.py)."""
    for name, words, value in (
        ("workers", "Workers started, the first one included.", state["generation"]),
        ("calls_answered", "Calls of syncfs that this worker has answered.", state["answered"]),
        ("calls_doubtful", "Calls that may have been told of an error twice, as a worker died.", state["doubtful"]),
        ("crashes", "Errors inside this worker; whoever called got EIO.", state["crashes"]),
        ("errors", "Errors of uppers that became known to this worker.", state["errors"]),
        ("told", "Calls that were told of an error by this worker.", state["told"]),
    ):
        yield CounterMetricFamily(f"overt_guard_{name}", words, value)
    yield _latency(state["latency"])
    yield from _containers(state["containers"])
    yield from _overlays(state["overlays"])
    yield from _uppers(state["uppers"])


def _latency(latency: dict[str, Any]) -> Metric:
    total = 0
    buckets = []
    for bound, calls in zip([*map(str, latency["bounds"]), "+Inf"], latency["calls"], strict=True):
        total += calls
        buckets.append((bound, total))
    return HistogramMetricFamily(
        "overt_guard_call_duration_seconds", "From when a call was taken until it was answered.",
        buckets=buckets, sum_value=latency["seconds"],
    )  # fmt: skip


def _containers(containers: list[dict[str, Any]]) -> Iterator[Metric]:
    ids = {each["id"] for each in containers}
    yield GaugeMetricFamily("overt_guard_containers", "Containers that are guarded.", len(ids))
    yield GaugeMetricFamily(
        "overt_guard_listeners", "Listeners: one for each container, and each exec.", len(containers)
    )
    waiting = GaugeMetricFamily("overt_guard_waiting_calls", "Calls that wait for an answer.", labels=["container"])
    for name in sorted(ids):
        waiting.add_metric([name], sum(each["waiting"] for each in containers if each["id"] == name))
    yield waiting


def _overlays(overlays: list[dict[str, Any]]) -> Iterator[Metric]:
    labels = ["container", "upperdir"]
    guarded = GaugeMetricFamily("overt_guard_overlay_guarded", "Whether an overlay's upper was found.", labels=labels)
    errors = GaugeMetricFamily(
        "overt_guard_overlay_errors", "Errors of its upper since an overlay was mounted.", labels=labels
    )
    told = GaugeMetricFamily(
        "overt_guard_overlay_told", "Calls in an overlay that were told of an error.", labels=labels
    )
    owed = GaugeMetricFamily(
        "overt_guard_overlay_owed", "Open files that are yet to be told of an error.", labels=labels
    )
    for each in overlays:
        for name in each["ids"]:
            for family, value in (
                (guarded, each["guarded"]), (errors, each["errors"]), (told, each["told"]), (owed, each["owed"]),
            ):  # fmt: skip
                family.add_metric([name, each["upperdir"]], value)
    yield from (guarded, errors, told, owed)


def _uppers(uppers: list[dict[str, Any]]) -> Iterator[Metric]:
    errors = GaugeMetricFamily("overt_guard_upper_errors", "Errors on record of an upper.", labels=["device"])
    flushes = CounterMetricFamily("overt_guard_upper_flushes", "Flushes of an upper.", labels=["device"])
    for each in uppers:
        errors.add_metric([each["device"]], each["recorded"])
        flushes.add_metric([each["device"]], each["flushes"])
    yield from (errors, flushes)
