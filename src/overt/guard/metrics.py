"""The guard's status as Prometheus reads it.

A process of its own asks for the status at each scrape. So the guard, which has capabilities and reads what containers
write, has no HTTP server; and that it does not answer is a metric as well. Needs prometheus_client (the extra
`metrics`; Debian: python3-prometheus-client).
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from overt.guard import supervisor
from overt.printable import printable

_PATIENCE = 5.0
"""seconds for the guard to answer: less than Prometheus waits, so that it hears that there was no answer"""
_MOST_UPPERS = 32
"""overlays of one container that are series of their own; a container can mount as many as it likes"""
_OTHERS = "(others)"
"""the upperdir of the rest"""


class Guard(Collector):
    """What to register with a prometheus_client registry: the guard that listens on `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def collect(self) -> Iterator[Metric]:
        """The metrics, now."""
        try:
            state = supervisor.ask(self.path, _PATIENCE)
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
    waiting = GaugeMetricFamily("overt_guard_waiting_calls", "Calls that wait for an answer.", labels=["container_id"])
    oldest = GaugeMetricFamily(
        "overt_guard_oldest_call_seconds", "How long the oldest of them has waited.", labels=["container_id"]
    )
    for name in sorted(ids):
        listeners = [each for each in containers if each["id"] == name]
        waiting.add_metric([printable(name)], sum(each["waiting"] for each in listeners))
        oldest.add_metric([printable(name)], max(each["longest"] for each in listeners))
    yield from (waiting, oldest)


def _overlays(overlays: list[dict[str, Any]]) -> Iterator[Metric]:
    by_labels = _by_labels(overlays)
    for key, words, several in (
        ("guarded", "Whether an overlay's upper was found.", min),
        ("errors", "Errors of its upper since an overlay was mounted, but for those of others only.", max),
        ("told", "Calls in an overlay that were told of an error.", sum),
        ("untold", "Whether there is an error of which nobody in an overlay was told yet.", max),
        ("owed", "Open files that are yet to be told of an error.", sum),
    ):
        family = GaugeMetricFamily(f"overt_guard_overlay_{key}", words, labels=["container_id", "upperdir"])
        for labels, those in by_labels.items():
            family.add_metric(labels, several(each[key] for each in those))
        yield family


def _by_labels(overlays: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The overlays by container and upperdir. Names are the container's to choose: several can be the same."""
    found: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    uppers: defaultdict[str, set[str]] = defaultdict(set)
    for each in overlays:
        upperdir = printable(each["upperdir"])
        for container in map(printable, each["ids"]):
            if len(uppers[container]) < _MOST_UPPERS:
                uppers[container].add(upperdir)
            found[container, upperdir if upperdir in uppers[container] else _OTHERS].append(each)
    return found


def _uppers(uppers: list[dict[str, Any]]) -> Iterator[Metric]:
    errors = GaugeMetricFamily("overt_guard_upper_errors", "Errors on record of an upper.", labels=["device"])
    flushes = CounterMetricFamily("overt_guard_upper_flushes", "Flushes of an upper.", labels=["device"])
    for each in uppers:
        errors.add_metric([each["device"]], each["recorded"])
        flushes.add_metric([each["device"]], each["flushes"])
    yield from (errors, flushes)
