"""What this machine is and what is installed on it, in words; and how long this process has been there."""

from __future__ import annotations

import importlib.metadata
import platform
import time


def processor() -> str:
    """The CPU's name as the kernel has it, else as Python has it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def installed_version(package: str) -> str | None:
    """None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def process_seconds() -> float:
    """How long this process has been there."""
    import psutil

    return time.time() - psutil.Process().create_time()
