"""How the kernels are launched: block sizes, warps, programs a row, each with its reason. Nothing is tuned at run time.

The numbers were chosen from compiled code (compile_offline.py), as instructions per logit and registers.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.options import Transform

from .row_math import IDENTITY, SCALE, SOFTCAP

# Warps a program. 4: a program is small enough that several share a multiprocessor, so that one loads while others
# compute; more warps would only make the one merge of lanes dearer.
WARPS = 4

# 16-byte loads a thread issues at once, which makes a block 8 KiB of logits (16 KiB where a warp has 64 lanes). 8 loads
# would spare 0.1 instructions per logit and take twice the registers, so half the programs at a time; with all
# statistics 255 registers.
VECTORS = 4

# Blocks a backward program does: reading the row's scalars is spread over them
BACKWARD_BLOCKS = 8
# Blocks a forward program does at least, where a row is split: with fewer, merging costs as much as splitting spares
FORWARD_BLOCKS = 4

# Programs a multiprocessor should get before rows are left whole. 8 programs of 4 warps keep 64 KiB of loads in flight,
# above the about 20 KiB (H100) to 40 KiB (B200) that latency times bandwidth asks of one multiprocessor.
PROGRAMS_PER_PROCESSOR = 8
# Programs a row at most: their states are merged by one warp
MAX_SPLITS = 64
# That warp: a row's few states fit its lanes, and more would have to meet in shared memory
COMBINE_WARPS = 1

# Values of a sequence a program reads at once: 8 a thread; sequences are a few hundred to a few thousand tokens
SEQUENCE_BLOCK = 1024

# Rows a warp of the column-mass kernel loads at once: 4 vectors a thread in flight, as in the row kernels. With 8 it
# would spare 0.15 instructions per logit and take half as many registers again
MASS_ROWS = 4

# Columns and tokens of a tile of P as it is gathered. 32 columns: a warp reads neighbours of one row, so that those in
# one sector are one fetch; 64 tokens: a column of P is stored in whole lines of 128 bytes. With 64 columns Triton gives
# each lane 8 of them, and no two lanes share a sector
GATHER_TILE = (32, 64)
# The same where P becomes D. 256 tokens are a warp's 16-byte accesses side by side; 16 columns, 4 a thread, share the
# reading of a token's scalars (10 instructions an element; 32 columns take 94 registers for 9)
GRADIENT_TILE = (16, 256)


class Plan(NamedTuple):
    """How a row kernel is launched."""

    programs: int  # a row
    span: int  # columns a program, a multiple of the block
    shape: dict[str, int]  # the kernels' VEC, LANES, BLOCK
    peel: bool  # a row may start or end off 16 bytes


class MassPlan(NamedTuple):
    """How the column-mass kernel is launched."""

    splits: int  # of the rows
    windows: int  # programs a split
    shape: dict[str, int]  # the kernel's VEC, COLS, ROWS
    peel: bool  # a row may start or end off 16 bytes


class TilePlan(NamedTuple):
    """How a kernel over tiles of columns x tokens is launched."""

    programs: int
    column_tiles: int
    token_tiles: int
    shape: dict[str, int]  # the kernel's VEC, COLS, TOKENS
    wide: bool  # a column starts on 16 bytes


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


def block_shape(item_size: int, warp_size: int, narrow: bool = False) -> dict[str, int]:
    """The row kernels' VEC, LANES, BLOCK. narrow: element by element."""
    vec, lanes = 16 // item_size, WARPS * warp_size
    if narrow:  # 16 elements a thread: with 32, the masks of the tail alone spill on AMD
        return {"VEC": 1, "LANES": lanes, "BLOCK": 16 * lanes}
    return {"VEC": vec, "LANES": lanes, "BLOCK": VECTORS * lanes * vec}


def forward_plan(logits: Tensor, rows: int) -> Plan:
    shape = block_shape(logits.element_size(), _warp_size(logits.device))
    blocks = -(-logits.shape[-1] // shape["BLOCK"])
    splits = max(1, min(_programs_wanted(logits, rows), MAX_SPLITS, blocks // FORWARD_BLOCKS))
    each = -(-blocks // splits)
    # Not `splits`: rounding up may have left no block for the last
    return Plan(-(-blocks // each), each * shape["BLOCK"], shape, peel=not _aligned(logits))


def backward_plan(logits: Tensor, out: Tensor, rows: int) -> Plan:
    # Only a slice of an odd V with a new out is not alike; no peeling of its rows serves both
    alike = _aligned_alike(logits, out)
    shape = block_shape(logits.element_size(), _warp_size(logits.device), narrow=not alike)
    blocks = -(-logits.shape[-1] // shape["BLOCK"])
    # Programs share nothing here: a row may be cut as finely as its blocks
    each = max(1, min(BACKWARD_BLOCKS, blocks // _programs_wanted(logits, rows)))
    return Plan(-(-blocks // each), each * shape["BLOCK"], shape, peel=alike and not _aligned(logits))


def mass_shape(item_size: int, warp_size: int) -> dict[str, int]:
    """The column-mass kernel's VEC, COLS (a window), ROWS (a block)."""
    vec = 16 // item_size
    return {"VEC": vec, "COLS": warp_size * vec, "ROWS": WARPS * MASS_ROWS}


def mass_plan(logits: Tensor) -> MassPlan:
    rows, vocab = logits.shape
    shape = mass_shape(logits.element_size(), _warp_size(logits.device))
    peel = not _aligned(logits[None])
    # Rows this far apart are as far from a 16-byte boundary
    period = shape["VEC"] // math.gcd(shape["VEC"], logits.stride(0))
    # A row that starts off the boundary may need a window more
    windows = -(-(vocab + (shape["VEC"] - 1 if peel else 0)) // shape["COLS"])
    # As many splits as fill the GPU, each with rows for a block
    splits = min(-(-PROGRAMS_PER_PROCESSOR * _processors(logits.device) // windows), rows // shape["ROWS"])
    return MassPlan(max(1, -(-splits // period)) * period, windows, shape, peel)


def tile_shape(tile: tuple[int, int], item_size: int) -> dict[str, int]:
    return {"VEC": 16 // item_size, "COLS": tile[0], "TOKENS": tile[1]}


def tile_plan(tile: tuple[int, int], like: Tensor, columns: int, tokens: int) -> TilePlan:
    shape = tile_shape(tile, like.element_size())
    column_tiles, token_tiles = -(-columns // tile[0]), -(-tokens // tile[1])
    return TilePlan(column_tiles * token_tiles, column_tiles, token_tiles, shape, tokens % shape["VEC"] == 0)


def _programs_wanted(logits: Tensor, rows: int) -> int:
    """Programs a row that fill the GPU."""
    return -(-PROGRAMS_PER_PROCESSOR * _processors(logits.device) // rows)


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
    """Multiprocessors; one under the interpreter, so that 8 rows suffice to leave rows whole there."""
    if device.type == "cpu":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
