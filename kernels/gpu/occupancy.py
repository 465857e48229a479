"""How many programs of a kernel a multiprocessor holds at once: an estimate from what the compiler says they take."""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """Of a multiprocessor (AMD: a compute unit), which has four schedulers (AMD: SIMDs)."""

    warps: int  # a scheduler's
    programs: int
    shared: int  # bytes
    reserved: int  # bytes of it that each program takes beside its own


SCHEDULERS = 4
# Registers that a scheduler has for each lane, and the unit in which a warp gets them
REGISTERS, UNIT = 512, 8
SHARED_UNIT = 128

# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (64 warps, 32 blocks, 65,536
# registers of 32 bits). AMD: LLVM's AMDGPU user guide and CDNA3's instruction set (8 waves and 512 VGPRs a SIMD, 64 KiB
# of LDS)
LIMITS: dict[int | str, Limits] = {
    80: Limits(16, 32, 164 * 1024, 1024),
    90: Limits(16, 32, 228 * 1024, 1024),
    100: Limits(16, 32, 228 * 1024, 1024),
    "gfx942": Limits(8, 32, 64 * 1024, 0),
}


def resident(arch: int | str, registers: int, shared: int, warps: int) -> tuple[int, float]:
    """(programs a multiprocessor holds, the share of its places for warps that they fill).

    Args:
        arch: of triton's GPUTarget: 80, 90, 100 or "gfx942"; any other is a KeyError.
        registers: a thread's (AMD: VGPRs, accumulators included).
        shared: bytes a program asks for.
        warps: of a program.
    """
    limits = LIMITS[arch]
    per_scheduler = min(limits.warps, REGISTERS // _up(max(registers, 1), UNIT))
    programs = min(per_scheduler * SCHEDULERS // warps, limits.programs)
    asked = _up(shared + limits.reserved, SHARED_UNIT)
    if asked:
        programs = min(programs, limits.shared // asked)
    return programs, programs * warps / (limits.warps * SCHEDULERS)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
