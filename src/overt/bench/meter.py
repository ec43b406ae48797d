"""What a server costs: processor time and memory of its processes."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

_CPUCLOCK_SCHED = 2  # include/linux/posix-timers_types.h; clock_getcpuclockid(3) builds the same number


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time that the processes have used so far, user and system, all threads, in seconds.

    utime + stime of /proc/PID/stat, read through the process's clock because that counts nanoseconds and not ticks of
    10 ms. Raises ProcessLookupError if one of them has ended.
    """
    total = 0
    for pid in pids:
        try:
            total += time.clock_gettime_ns(~pid << 3 | _CPUCLOCK_SCHED)
        except OSError:
            raise ProcessLookupError(3, f"server process {pid} has ended") from None
    return total / 1e9


def proportional_bytes(pids: Iterable[int]) -> int:
    """Pss of the processes in bytes: what several of them share is counted once (proc_pid_smaps_rollup(5))."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def available_bytes() -> int:
    """Memory that can be had without swapping, in bytes (MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(2, os.strerror(2), "/proc/meminfo: MemAvailable")
