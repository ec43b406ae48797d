"""One sample: one system, freshly started, doing one workload once."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from overt.bench import meter
from overt.bench.systems import Layers, System


class Scale(NamedTuple):
    """How much of everything; sizes in MiB, times in seconds."""

    files: int
    listed: int
    tree: int
    checkout: int
    fio_size: int
    fio_seconds: float
    lower_size: int
    syncs: int
    mounts: int
    disk: int


FULL = Scale(2000, 5000, 20_000, 5000, 256, 2.0, 1024, 200, 1000, 4 << 10)
QUICK = Scale(300, 1000, 1000, 1000, 64, 0.3, 128, 50, 100, 768)


class Reading(NamedTuple):
    """What one sample says about one row."""

    row: str
    value: float
    """In the row's unit."""
    cpu: float
    """Processor time of the server meanwhile, in seconds."""


class Measurement:
    """Wall time of a block, in seconds; a block that knows better what to report sets `value`."""

    def __init__(self) -> None:
        self.value: float | None = None


class Sample:
    """What a workload works with, and what it found."""

    def __init__(self, system: System, place: Path, layers: Layers, scale: Scale) -> None:
        self.system = system
        self.place = place
        self.layers = layers
        self.scale = scale
        self.target = place / "m"
        self.readings: list[Reading] = []

    def cpu(self) -> float:
        """Processor time of the servers so far, in seconds."""
        return meter.cpu_seconds(self.system.pids())

    @contextlib.contextmanager
    def row(self, name: str, per: float = 1.0) -> Iterator[Measurement]:
        """Measure the block: its wall time in seconds divided by `per`, and the servers' processor time."""
        measurement = Measurement()
        cpu = self.cpu()
        begin = time.perf_counter()
        yield measurement
        seconds = time.perf_counter() - begin
        value = seconds / per if measurement.value is None else measurement.value
        self.readings.append(Reading(name, value, self.cpu() - cpu))
