"""Alternating timings of several contenders: both sides in one run, medians. What may be timed at all: gate.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..memory import peak_memory_mib, resident_memory_mib
from ..system import processor
from . import gpu
from .gpu import Cost


def wall_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternate(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    before: dict[str, Callable[[], object]] | None = None,
    seconds_of: Callable[[Callable[[], object]], float] = wall_seconds,
) -> dict[str, float]:
    """Median seconds of each contender; every round runs each once, in turn. `before` runs off the clock.

    `seconds_of` makes a call and times it.
    """
    times = alternating(contenders, rounds, warmup, before, seconds_of=seconds_of)
    return {name: statistics.median(values) for name, values in times.items()}


def alternating(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    before: dict[str, Callable[[], object]] | None = None,
    seconds: float | None = None,
    seconds_of: Callable[[Callable[[], object]], float] = wall_seconds,
) -> dict[str, list[float]]:
    """All of `alternate`'s times. No round starts that would not end within `seconds`, except the first."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    begin = time.perf_counter()
    for turn in range(warmup + rounds):
        taken = time.perf_counter() - begin
        if seconds is not None and turn > warmup and taken * (turn + 1) / turn > seconds:
            break
        for name, call in contenders.items():
            if before and name in before:
                before[name]()
            took = seconds_of(call)
            if turn >= warmup:
                times[name].append(took)
    return times


def peak_mib(call: Callable[[], Sequence[Tensor]]) -> tuple[float, float]:
    """Peak resident MiB of one call above what was resident before and the tensors it returns; and its seconds.

    For a process of its own: what it held at its most before is forgotten (Linux; elsewhere it hides smaller peaks).
    """
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")
    before, start = resident_memory_mib(), time.perf_counter()
    returned = call()
    seconds = time.perf_counter() - start
    return peak_memory_mib() - before - sum(tensor.nbytes for tensor in returned) / 2**20, seconds


def cost_on(device: torch.device) -> Callable[[Callable[[], Sequence[Tensor]]], Cost]:
    """What measures a call on a device: on a CPU for a process of its own."""
    if device.type == "cpu":

        def measured(call: Callable[[], Sequence[Tensor]]) -> Cost:
            mib, seconds = peak_mib(call)
            return Cost(seconds, mib)

        return measured
    return gpu.cost


def data_mib() -> float:
    """MiB of data that this process holds, as RLIMIT_DATA counts it; 0 where the system does not say (not Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) / 2**10


def machine() -> str:
    """One line: what the figures were taken on."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor()}, {torch.get_num_threads()} threads, {capability}, torch {torch.__version__}"
