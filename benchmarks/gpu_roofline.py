"""A bound on speed that needs no GPU: what memory, issue slots and the special-function units allow at most.

    seconds per logit >= max(bytes / bandwidth, instructions / issue rate, special / special rate)

An ESTIMATE from published device numbers, counted bytes and compiled instructions. It leaves out latency, occupancy,
caches, instructions slower than one a slot, and clocks below the peak: no kernel is faster, every kernel is slower.
"""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    name: str
    target: str  # of compile_offline.TARGETS
    processors: int  # multiprocessors, compute units
    clock: float  # peak, Hz
    lanes: int  # lane-instructions a processor issues in a cycle
    special: int  # of those, to the special-function units
    slots: int  # that one of them holds of the issue slots
    bandwidth: float  # bytes/s


# H100 SXM5 and B200: NVIDIA's datasheets (67 and 75 TFLOPS of float32 = processors * 128 FMAs * clock; 3.35, 8 TB/s);
# 4 schedulers issue a warp instruction each in a cycle, 16 special functions: CUDA C++ Programming Guide, "Throughput
# of Native Arithmetic Instructions". MI300X: AMD's datasheet and CDNA3 white paper (304 compute units, 2.1 GHz,
# 5.3 TB/s; 4 SIMDs of 16 lanes, on which transcendentals run at a quarter of the rate and nothing beside them)
DEVICES = (
    Device("H100 SXM", "sm_90", 132, 1.98e9, 128, 16, 1, 3.35e12),
    Device("MI300X", "gfx942", 304, 2.10e9, 64, 16, 4, 5.3e12),
    Device("B200", "sm_100", 148, 1.98e9, 128, 16, 1, 8.0e12),
)


class Work(NamedTuple):
    """Of a loop, per logit."""

    moved: float  # bytes
    instructions: float
    special: float  # among the instructions


def seconds(work: Work, device: Device) -> dict[str, float]:
    """Seconds per logit that each resource takes: memory, issue, special."""
    rate = device.processors * device.clock
    slots = work.instructions + (device.slots - 1) * work.special
    return {
        "memory": work.moved / device.bandwidth,
        "issue": slots / (rate * device.lanes),
        "special": work.special / (rate * device.special),
    }


def estimate(loops: list[Work], needed: float, device: Device) -> dict[str, float | str]:
    """Loops one after another.

    Args:
        loops: that a pass runs over the logits.
        needed: bytes per logit that any implementation of the pass has to move.

    Returns:
        seconds per logit at least; limit: which resource takes most of them; share: of the bandwidth bound
        (`needed` / bandwidth) that can be reached at most.
    """
    total, by_limit = 0.0, dict.fromkeys(("memory", "issue", "special"), 0.0)
    for loop in loops:
        times = seconds(loop, device)
        limit = max(times, key=times.__getitem__)
        total += times[limit]
        by_limit[limit] += times[limit]
    # Bytes beyond the needed count as lost, too
    share = needed / device.bandwidth / total
    return {"seconds": total, "limit": max(by_limit, key=by_limit.__getitem__), "share": share}
