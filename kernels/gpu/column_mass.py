"""Column-mass kernel: the probability that each column of the vocabulary holds in a tile, reading each logit once.

    m[v] = sum_i exp(z[i, v] - lse[i])

logits [n, V], lse [n] -> m [V]. Bytes: n * V * itemsize, and 8 V a split but the only one.

A program owns a window of columns: a warp's 16-byte loads, side by side. Its warps take different rows, each lane sums
its columns on its own, and the warps meet once, at the end. Where the windows are too few to fill a GPU, rows are split
over programs too, row i to split i % splits, and the splits are added in order: no atomics, the same bits every time.

With odd V rows start at different distances from a 16-byte boundary, but rows a fixed period apart at the same (8 rows
for bf16): `splits` is a multiple of that period, so that a split's windows start on a boundary in every row of it. Only
a window that sticks out of the vocabulary is loaded column by column.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdpo.options import Transform

from . import launch
from .row_math import LN2, LOG2E, transformed


@triton.jit
def log2_lse(lse):
    """(lse2, factor): exp(z - lse) = exp2(z * log2e - lse2) * factor.

    lse2 is lse * log2e, rounded; what rounding took is known exactly, and exp2 of so little is linear.
    """
    lse2 = lse * LOG2E
    return lse2, tl.fma(tl.fma(lse, LOG2E, -lse2), -LN2, 1.0)


@triton.jit
def added(mass, pointers, row_lse, counted, there, inner, outer, KIND: tl.constexpr):
    """mass + the probabilities of a block [ROWS, COLS]. counted [ROWS, 1], there [ROWS, COLS]: masks; None: all."""
    if counted is None:
        raw = tl.load(pointers)
        lse2, factor = log2_lse(tl.load(row_lse))
    else:
        raw = tl.load(pointers, mask=there, other=0.0)
        lse2, factor = log2_lse(tl.load(row_lse, mask=counted, other=0.0))
        factor = tl.where(counted, factor, 0.0)
    z = transformed(raw.to(tl.float32), inner, outer, KIND)[0]
    p = tl.exp2(tl.fma(z, LOG2E, -lse2))
    return tl.fma(p, tl.broadcast_to(factor, p.shape), mass)


@triton.jit(do_not_specialize=("rows", "vocab", "stride", "splits", "windows"))
def column_mass_kernel(
    logits,  # [n, V]
    lse,  # [n]
    sums,  # float32 [splits, V]
    rows,  # n
    vocab,  # V
    stride,  # of logits' rows
    splits,
    windows,  # programs a split
    inner,
    outer,
    KIND: tl.constexpr,
    PEEL: tl.constexpr,  # rows may start or end off 16 bytes
    VEC: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    split = program // windows
    pointer = logits + split.to(tl.int64) * stride
    past = 0  # columns from the boundary before the row's start
    if PEEL:
        ELEMENT: tl.constexpr = 16 // VEC
        past = (pointer.to(tl.int64) % 16 // ELEMENT).to(tl.int32)
    first = (program - split * windows) * COLS - past
    columns = tl.arange(0, COLS)[None, :]
    step = tl.multiple_of(stride.to(tl.int64) * splits, VEC)
    aligned = tl.multiple_of(pointer + first, 16)
    block = tl.arange(0, ROWS)
    mass = tl.zeros([ROWS, COLS], tl.float32)
    count = (rows - split + splits - 1) // splits
    full = count // ROWS * ROWS

    end = vocab - first if PEEL else tl.multiple_of(vocab - first, VEC)
    inside = (columns >= -first) & (columns < end)
    if (first >= 0) & (end >= COLS):
        for start in range(0, full, ROWS):
            row = (start + block)[:, None]
            pointers = aligned + row * step + columns
            mass = added(mass, pointers, lse + split + row * splits, None, None, inner, outer, KIND)
        if full < count:
            row = (full + block)[:, None]
            pointers = aligned + row * step + columns
            there = (row < count) & (columns < COLS)
            mass = added(mass, pointers, lse + split + row * splits, row < count, there, inner, outer, KIND)
    else:
        for start in range(0, count, ROWS):
            row = (start + block)[:, None]
            pointers = aligned + row * step + columns
            there = (row < count) & inside
            mass = added(mass, pointers, lse + split + row * splits, row < count, there, inner, outer, KIND)
    out = sums + split.to(tl.int64) * vocab + first + tl.arange(0, COLS)
    tl.store(out, tl.sum(mass, 0), mask=tl.reshape(inside, [COLS]))


def column_mass(logits: Tensor, lse: Tensor, transform: Transform) -> Tensor:
    """logits `[n, V]`, lse `[n]` -> the probability that each column holds over the rows, `[V]`: as eager's."""
    rows, vocab = logits.shape
    plan = launch.mass_plan(logits)
    sums = lse.new_empty((plan.splits, vocab))
    kind, inner, outer = launch.transform_arguments(transform)
    launch.run(
        column_mass_kernel,
        plan.splits * plan.windows,
        launch.WARPS,
        (logits, lse, sums, rows, vocab, logits.stride(0), plan.splits, plan.windows, inner, outer),
        KIND=kind,
        PEEL=plan.peel,
        **plan.shape,
    )
    return sums[0] if plan.splits == 1 else sums.sum(0)
