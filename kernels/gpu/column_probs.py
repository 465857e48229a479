"""Column-probabilities kernel: the softmax of the kept columns, transposed; and what each token has outside of them.

    P[c, i] = exp(z[i, columns[c]] - lse[i])                       t[i] = 1 - sum_c P[c, i]

logits [n, V], columns [k] -> P [k, n], t [n]. Bytes: of the logits, the 32-byte sectors that hold a kept column (a read
of two bytes fetches its sector); k * n * itemsize of P. A program takes a tile of columns x tokens: lanes run over
columns as it gathers, so that columns that share a sector are one fetch; over tokens as it stores, 16 bytes each.

The sum is of P before its rounding, and in float64: t may be far below float32's 1e-7 of 1. The tiles of columns are
added in order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.options import Transform

from . import launch
from .column_mass import log2_lse
from .row_math import LOG2E, transformed


@triton.jit(do_not_specialize=("rows", "stride", "kept", "token_tiles"))
def column_probs_kernel(
    logits,  # [n, V]
    lse,  # [n]
    columns,  # int32 [k]
    probs,  # [k, n]
    kept_mass,  # float64 [ceil(k / COLS), n]
    rows,  # n
    stride,  # of logits' rows
    kept,  # k
    token_tiles,
    inner,
    outer,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,  # n is a multiple of VEC
    VEC: tl.constexpr,
    COLS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    program = tl.program_id(0)
    column_tile = program // token_tiles
    token = (program - column_tile * token_tiles) * TOKENS + tl.arange(0, TOKENS)
    slot = column_tile * COLS + tl.arange(0, COLS)
    column = tl.load(columns + slot, mask=slot < kept, other=0)
    there = (token < rows)[:, None] & (slot < kept)[None, :]
    raw = tl.load(logits + token.to(tl.int64)[:, None] * stride + column[None, :], mask=there, other=0.0)
    lse2, factor = log2_lse(tl.load(lse + token, mask=token < rows, other=0.0))
    z = transformed(raw.to(tl.float32), inner, outer, KIND)[0]
    p = tl.exp2(tl.fma(z, LOG2E, -lse2[:, None])) * factor[:, None]
    p = tl.where(there, p, 0.0)
    tl.store(kept_mass + column_tile.to(tl.int64) * rows + token, tl.sum(p.to(tl.float64), 1), mask=token < rows)

    size = rows
    if WIDE:  # a hint on the argument itself would be folded away
        size = tl.multiple_of(rows // VEC * VEC, VEC)
    out = probs + slot.to(tl.int64)[:, None] * size + token[None, :]
    within = (slot < kept)[:, None] & (token < size)[None, :]
    tl.store(out, tl.trans(p).to(probs.dtype.element_ty), mask=within)


def column_probs(logits: Tensor, lse: Tensor, columns: Tensor, transform: Transform) -> tuple[Tensor, Tensor]:
    """logits `[n, V]`, lse `[n]`, columns int32 `[k]` -> P `[k, n]` in logits' dtype, t `[n]`: as eager's."""
    rows, kept = logits.shape[0], columns.shape[0]
    plan = launch.tile_plan(launch.GATHER_TILE, logits, kept, rows)
    probs = logits.new_empty((kept, rows))
    kept_mass = lse.new_empty((plan.column_tiles, rows), dtype=torch.float64)
    kind, inner, outer = launch.transform_arguments(transform)
    if plan.programs:
        launch.run(
            column_probs_kernel,
            plan.programs,
            launch.WARPS,
            (logits, lse, columns, probs, kept_mass, rows, logits.stride(0), kept, plan.token_tiles, inner, outer),
            KIND=kind,
            WIDE=plan.wide,
            **plan.shape,
        )
    return probs, (1 - kept_mass.sum(0)).clamp_(min=0).to(lse.dtype)
