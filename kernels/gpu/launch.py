"""How the kernels are launched: block sizes, warps, programs a row, each with its reason. Nothing is tuned at run time.

The numbers were chosen from compiled code (compile_offline.py), as instructions per logit and registers.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.options import Transform

from .row_math import IDENTITY, SCALE, SOFTCAP

# Warps a program. 4: a program is small enough that several share a multiprocessor, so that one loads while others
# compute; more warps would only make the one merge of lanes dearer.
WARPS = 4

# Bytes of logits a program holds in registers at once. Forward, 16 KiB: 8 16-byte loads in flight a thread (4 where a
# wave has 64 lanes), which spreads the rescaling of the running sums over 64 logits; 32 KiB would spill.
FORWARD_BLOCK_BYTES = 16384
# Backward, 8 KiB: holds a block's logits and its gradients, and has no running sums to spread.
BACKWARD_BLOCK_BYTES = 8192

# Blocks a backward program does: reading the row's scalars is spread over 8 blocks (64 KiB of logits)
BACKWARD_BLOCKS = 8
# Blocks a forward program does at least, where a row is split: fewer, and merging costs as much as it spares
FORWARD_BLOCKS = 2

# Programs a multiprocessor should get before rows are left whole. 4 programs of 4 warps keep 64 KiB of loads in flight,
# above the about 20 KiB (H100) to 40 KiB (B200) that latency times bandwidth asks of one multiprocessor.
PROGRAMS_PER_PROCESSOR = 4
# Programs a row at most: their states are merged by one warp, and 64 fill every GPU with as few as 9 rows
MAX_SPLITS = 64


class ForwardPlan(NamedTuple):
    splits: int  # programs a row
    span: int  # columns a program
    block: int
    lanes: int
    vec: int  # logits in 16 bytes
    warps: int
    peel: bool


class BackwardPlan(NamedTuple):
    chunks: int  # programs a row
    span: int
    block: int
    lanes: int
    vec: int
    warps: int
    peel: bool
    wide: bool  # logits and out are aligned alike: 16-byte accesses on both


def unavailable() -> str | None:
    """Why the kernels cannot run here; None if they can. (Without Triton, importing this module fails.)"""
    if interpreted() or torch.cuda.is_available():
        return None
    return "no GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, for tests)"


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def run(kernel: Any, programs: int, warps: int, arguments: tuple[Any, ...], **constants: Any) -> None:
    """Launch on the device of the first argument. Axis x alone: y and z stop at 65,535."""
    # The FMAs are explicit: the same code whatever the default of the Triton version
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)


def transform_arguments(transform: Transform) -> tuple[int, float, float]:
    """(KIND, inner, outer) of row_math.transformed."""
    scale, softcap, temperature = transform
    if softcap is not None:
        return SOFTCAP.value, scale / softcap, softcap / temperature
    return (IDENTITY if scale == temperature else SCALE).value, 1.0, scale / temperature


def forward_plan(logits: Tensor, rows: int) -> ForwardPlan:
    vec = 16 // logits.element_size()
    block = FORWARD_BLOCK_BYTES // logits.element_size()
    blocks = -(-logits.shape[-1] // block)
    wanted = -(-PROGRAMS_PER_PROCESSOR * _processors(logits.device) // rows)
    splits = max(1, min(wanted, MAX_SPLITS, blocks // FORWARD_BLOCKS))
    span = -(-blocks // splits) * block
    splits = -(-blocks * block // span)  # rounding the span up may leave none for the last
    return ForwardPlan(splits, span, block, WARPS * _warp_size(logits.device), vec, WARPS, not _aligned(logits))


def backward_plan(logits: Tensor, out: Tensor, rows: int) -> BackwardPlan:
    vec = 16 // logits.element_size()
    block = BACKWARD_BLOCK_BYTES // logits.element_size()
    blocks = -(-logits.shape[-1] // block)
    wanted = -(-PROGRAMS_PER_PROCESSOR * _processors(logits.device) // rows)
    # Programs share nothing here: a row may be cut as finely as its blocks
    each = max(1, min(BACKWARD_BLOCKS, blocks // wanted))
    wide = _aligned_alike(logits, out)
    peel = not (_aligned(logits) and _aligned(out))
    lanes = WARPS * _warp_size(logits.device)
    return BackwardPlan(-(-blocks // each), each * block, block, lanes, vec, WARPS, peel, wide)


def _aligned(rows: Tensor) -> bool:
    """Every row starts and ends on 16 bytes."""
    unit = 16 // rows.element_size()
    inside = rows.shape[2] % unit == 0 and all(rows.stride(i) % unit == 0 for i in (0, 1) if rows.shape[i] > 1)
    return inside and rows.data_ptr() % 16 == 0


def _aligned_alike(a: Tensor, b: Tensor) -> bool:
    """Each row of a starts as far from a 16-byte boundary as the same row of b."""
    unit = 16 // a.element_size()
    strides = all((a.stride(i) - b.stride(i)) % unit == 0 for i in (0, 1) if a.shape[i] > 1)
    return strides and (a.data_ptr() - b.data_ptr()) % 16 == 0


@functools.cache
def _warp_size(device: torch.device) -> int:
    if interpreted():
        return 32
    import triton

    with torch.cuda.device(device):
        return int(triton.runtime.driver.active.get_current_target().warp_size)


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors; one under the interpreter, so that 4 rows suffice to leave rows whole there."""
    if device.type == "cpu":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
