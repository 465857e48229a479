"""What this process holds, as its system says: for measurements, without importing a trainer."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_memory_mib() -> float:
    """The most resident memory that this process has held, MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it started us
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def resident_memory_mib() -> float:
    """The resident memory of this process now, MiB."""
    import psutil

    return psutil.Process().memory_info().rss / 2**20
