"""Time and memory on a GPU (NVIDIA, or AMD by ROCm: one torch.cuda for both), and what the device itself can do.

Times are CUDA events'. The cache is not flushed between runs: weight and its gradient are far beyond an L2 cache.
Memory is what torch's allocator handed out, `torch.cuda.max_memory_allocated`: not its reserve, nor the context.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Cost(NamedTuple):
    """Of one call."""

    seconds: float
    mib: float  # peak above what was held before and the tensors that it returned


class Ceilings(NamedTuple):
    """What a device reaches in the best case, measured."""

    bytes_per_second: float  # read and written, of a copy
    flop_per_second: float  # of a matrix product


def cost(call: Callable[[], Sequence[Tensor]]) -> Cost:
    """Of one call on the current device, which nothing else of this process uses."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    returned = call()
    end.record()
    end.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in returned)
    return Cost(start.elapsed_time(end) / 1e3, peak / 2**20)


def ceilings(
    dtype: torch.dtype, device: torch.device, size: int = 8192, copied: int = 1 << 29, rounds: int = 10
) -> Ceilings:
    """Measured: a copy of `copied` bytes, and the product of two square matrices of `size` in dtype; medians."""
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _median(lambda: target.copy_(source), rounds)
    bandwidth = 2 * copied / seconds
    left, right, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    seconds = _median(lambda: torch.mm(left, right, out=out), rounds)
    return Ceilings(bandwidth, 2 * size**3 / seconds)


def describe(device: torch.device) -> str:
    """One line: what the figures were taken on."""
    toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{torch.cuda.get_device_name(device)}, {toolkit}, torch {torch.__version__}"


def _median(call: Callable[[], Tensor], rounds: int, warmup: int = 3) -> float:
    def nothing_kept() -> list[Tensor]:
        call()
        return []

    times = [cost(nothing_kept).seconds for _ in range(warmup + rounds)]
    return statistics.median(times[warmup:])
