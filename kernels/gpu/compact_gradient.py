"""Compact-gradient kernel: from the kept columns' probabilities to their gradient.

    D[c, i] = dz/draw * g_i * (1[columns[c] = y_i] - P[c, i])          dz/draw = slope * (1 - tanh^2) under a softcap

P [k, n], columns [k], y, g, logp, lse [n] -> D [k, n]. Bytes: 2 * k * n * itemsize. A program takes a tile of columns
x tokens, lanes along tokens. The target's gradient comes from its saved logp, which is exact where P is rounded, and so
does the tanh, from z = log P + lse.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdpo.options import Transform

from . import launch
from .row_math import LN2, LOG2E, SOFTCAP


@triton.jit
def flatness(z, per_z):
    """1 - tanh^2, tanh = z * per_z, which rounding may have taken past 1"""
    t = tl.minimum(tl.maximum(z * per_z, -1.0), 1.0)
    return tl.fma(-t, t, 1.0)


# columns: a slice of a tile's, which starts anywhere
@triton.jit(do_not_specialize=("kept", "rows", "token_tiles"), do_not_specialize_on_alignment=("columns",))
def compact_gradient_kernel(
    probs,  # [k, n]
    columns,  # int32 [k]
    targets,  # int64 [n]
    logps,  # [n]
    lse,  # [n]
    grad_logps,  # [n]
    gradient,  # [k, n]
    kept,  # k
    rows,  # n
    token_tiles,
    slope,  # d z / d raw, where raw is small under a softcap
    per_z,  # tanh = z * per_z
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
    size = rows
    if WIDE:
        size = tl.multiple_of(rows // VEC * VEC, VEC)
    offsets = slot.to(tl.int64)[:, None] * size + token[None, :]
    there = (slot < kept)[:, None] & (token < size)[None, :]
    p = tl.load(probs + offsets, mask=there, other=0.0).to(tl.float32)

    known = token < size
    column = tl.load(columns + slot, mask=slot < kept, other=-1)
    target = tl.load(targets + token, mask=known, other=-1).to(tl.int32)
    grad_logp = tl.load(grad_logps + token, mask=known, other=0.0) * slope
    logp = tl.load(logps + token, mask=known, other=0.0)
    target_grad = grad_logp * (1 - tl.exp2(logp * LOG2E))
    grad = p * -grad_logp[None, :]
    if KIND == SOFTCAP:
        row_lse = tl.load(lse + token, mask=known, other=0.0)
        target_grad *= flatness(logp + row_lse, per_z)
        grad *= flatness(tl.fma(tl.log2(tl.maximum(p, 1e-38)), LN2, row_lse[None, :]), per_z)
    grad = tl.where(column[:, None] == target[None, :], target_grad[None, :], grad)
    tl.store(gradient + offsets, grad.to(gradient.dtype.element_ty), mask=there)


def compact_gradient(
    probs: Tensor,  # [k, n]
    columns: Tensor,  # int32 [k], ascending: the columns of probs
    targets: Tensor,  # int64 [n]; one not among columns has no one-hot here
    logps: Tensor,  # [n]
    lse: Tensor,  # [n]
    grad_logps: Tensor,  # [n]
    transform: Transform,
) -> Tensor:
    """d(sum grad_logps*logps) / d(raw logits[:, columns]), transposed: `[k, n]` in the dtype of probs: as eager's."""
    kept, rows = probs.shape
    gradient = probs.new_empty((kept, rows))
    plan = launch.tile_plan(launch.GRADIENT_TILE, probs, kept, rows)
    if plan.programs:
        slope = transform.logit_scale / transform.temperature
        per_z = 0.0 if transform.softcap is None else transform.temperature / transform.softcap
        tensors = (probs.contiguous(), columns, targets, logps, lse, grad_logps, gradient)
        launch.run(
            compact_gradient_kernel,
            plan.programs,
            launch.WARPS,
            (*tensors, kept, rows, plan.token_tiles, slope, per_z),
            KIND=launch.transform_arguments(transform)[0],
            WIDE=plan.wide,
            **plan.shape,
        )
    return gradient
