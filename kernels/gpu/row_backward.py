"""Backward row kernel: the gradient of the logits, reading each logit once and writing each gradient once.

    d logp / d z_j = 1[j = y] - p_j                 d H / d z_j = -p_j (log p_j + H)          p_j = exp(z_j - lse)
    out_j = (grad_logps * (1[j = y] - p_j) - grad_entropy * p_j (log p_j + H)) * dz_j / draw_j

logits [G, R, W], lse [G*R], ... -> out [G, R, W], which may be the logits. Bytes: 2 * W * itemsize a row.

In base 2 with d_j = z_j * log2e - lse * log2e (one FMA), both gradients together are 2^d_j * (A + B d_j): A and B are
scalars of the row. The target's gradient is a scalar too, known from `logps`: the thread that owns its column puts it
in place, in the one block that has it. No second store to that address, so nothing to race with, and no comparison in
the other blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdpo.options import Transform

from . import launch
from .row_math import (
    LN2,
    LOG2_OF_ZERO,
    LOG2E,
    NO_MAX,
    SOFTCAP,
    aligned_part,
    edge_columns,
    row_start,
    transformed,
)

# Specialising on their divisibility or on 1 would compile anew as batches vary, and gain nothing: alignment is PEEL's
INTEGERS = ("rows", "width", "stride_g", "stride_r", "out_stride_g", "out_stride_r", "chunks", "span", "vocab_start")


@triton.jit
def gradient(raw, row_scalars, inner, outer, KIND: tl.constexpr, ENTROPY: tl.constexpr):
    """(float32 gradient as if no column were the target, d z / d raw / slope) of raw logits of any shape."""
    lse2, a, b = row_scalars
    z, t = transformed(raw.to(tl.float32), inner, outer, KIND)
    d = tl.fma(z, LOG2E, -lse2)
    grad = tl.exp2(d)
    if ENTROPY:
        # 0 * -inf would be NaN: where p = 0, p log p is 0
        grad *= tl.fma(tl.maximum(d, LOG2_OF_ZERO), b, a)
    else:
        grad *= a
    if KIND == SOFTCAP:
        # d tanh(x)/dx = 1 - tanh(x)^2
        flat = tl.fma(-t, t, 1.0)
        return grad * flat, flat
    return grad, t


@triton.jit
def one_hot(column, VEC: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """`arange(BLOCK) == column` by parts: a thread would keep its 32 column numbers in registers through the loop."""
    lane, k, j = column // VEC % LANES, column // (VEC * LANES), column % VEC
    at_lane = (tl.arange(0, LANES) == lane)[None, :, None]
    at_k = (tl.arange(0, BLOCK // (VEC * LANES)) == k)[:, None, None]
    at_j = (tl.arange(0, VEC) == j)[None, None, :]
    return tl.reshape(at_k & at_lane & at_j, [BLOCK])


@triton.jit
def with_target(grad, flat, at_target, target_grad, KIND: tl.constexpr):
    """The gradient with the target's column in place."""
    if KIND == SOFTCAP:
        return tl.where(at_target, target_grad * flat, grad)
    return tl.where(at_target, target_grad, grad)


@triton.jit(do_not_specialize=INTEGERS)
def row_backward_kernel(
    logits,  # [G, R, W]
    out,  # [G, R, W]
    targets,  # int64 [G*R]
    logps,  # [G*R]
    lse,  # [G*R]
    entropy,  # [G*R] or None
    grad_logps,  # [G*R] or None
    grad_entropy,  # [G*R] or None
    rows,  # R
    width,  # W
    stride_g,
    stride_r,
    out_stride_g,
    out_stride_r,
    chunks,  # programs a row
    span,  # columns a program, a multiple of BLOCK
    vocab_start,
    inner,
    outer,
    slope,  # d z / d raw, where raw is small under a softcap
    KIND: tl.constexpr,
    PEEL: tl.constexpr,  # rows may start or end off 16 bytes
    VEC: tl.constexpr,  # 1: rows of logits and out are aligned differently, and no peeling serves both
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ENTROPY: tl.constexpr = grad_entropy is not None
    program = tl.program_id(0)
    row = program // chunks
    chunk = program - row * chunks
    target = tl.load(targets + row).to(tl.int32)
    source = logits + row_start(row, rows, stride_g, stride_r)
    sink = out + row_start(row, rows, out_stride_g, out_stride_r)
    head, body = aligned_part(source, width, PEEL, VEC)
    aligned = source
    aligned_sink = sink
    if PEEL:
        aligned = tl.multiple_of(source + head, 16)
        aligned_sink = tl.multiple_of(sink + head, 16)
    elif VEC > 1:
        aligned = tl.multiple_of(source, 16)
        aligned_sink = tl.multiple_of(sink, 16)
    begin = tl.multiple_of(chunk * span, BLOCK)
    end = tl.multiple_of(tl.maximum(begin, tl.minimum(begin + span, body)), VEC)
    full = begin + (end - begin) // BLOCK * BLOCK
    columns = tl.arange(0, BLOCK)
    within = columns < end - full
    # The row's first program does all its edges
    edges, at_edge = edge_columns(head, body, tl.where(chunk == 0, width, 0), LANES, VEC)

    if target < 0:  # not read
        nothing = tl.zeros([BLOCK], out.dtype.element_ty)
        for start in range(begin, full, BLOCK):
            tl.store(aligned_sink + start + columns, nothing)
        if full < end:
            tl.store(aligned_sink + full + columns, nothing, mask=within)
        if PEEL:
            tl.store(sink + edges, tl.zeros([LANES], out.dtype.element_ty), mask=at_edge)
        return

    y = target - vocab_start  # outside [0, W): no column is the target
    y_aligned = y - head
    # lse * log2e = lse2 + rest exactly; 2^-rest goes into the scalars, so that a large lse costs no accuracy
    row_lse = tl.load(lse + row)
    lse2 = row_lse * LOG2E
    rest = tl.fma(row_lse, LOG2E, -lse2)
    factor = slope * tl.exp2(-rest)
    target_logp = tl.load(logps + row)
    target_p = tl.exp2(target_logp * LOG2E)
    target_grad = 0.0
    a = 0.0
    b = 0.0
    if grad_logps is not None:
        grad_logp = tl.load(grad_logps + row).to(tl.float32)
        target_grad = grad_logp * (1 - target_p) * slope
        a = -grad_logp * factor
    if ENTROPY:
        # -p_j (log p_j + H), log p_j = (d_j - rest) ln 2
        grad_h = tl.load(grad_entropy + row).to(tl.float32)
        h = tl.load(entropy + row)
        target_grad -= grad_h * target_p * (tl.maximum(target_logp, LOG2_OF_ZERO) + h) * slope
        a -= grad_h * (h - rest * LN2) * factor
        b = -grad_h * LN2 * factor
    row_scalars = (lse2, a, b)

    if PEEL:
        raw_edges = tl.load(source + edges, mask=at_edge, other=NO_MAX)
        edge_grad, edge_flat = gradient(raw_edges, row_scalars, inner, outer, KIND, ENTROPY)
        edge_grad = with_target(edge_grad, edge_flat, edges == y, target_grad, KIND)
        tl.store(sink + edges, edge_grad.to(out.dtype.element_ty), mask=at_edge)

    for start in range(begin, full, BLOCK):
        grad, flat = gradient(tl.load(aligned + start + columns), row_scalars, inner, outer, KIND, ENTROPY)
        if (start <= y_aligned) & (y_aligned < start + BLOCK):
            at_target = one_hot(y_aligned - start, VEC, LANES, BLOCK)
            grad = with_target(grad, flat, at_target, target_grad, KIND)
        tl.store(aligned_sink + start + columns, grad.to(out.dtype.element_ty))

    if full < end:
        raw = tl.load(aligned + full + columns, mask=within, other=NO_MAX)
        grad, flat = gradient(raw, row_scalars, inner, outer, KIND, ENTROPY)
        grad = with_target(grad, flat, columns == y_aligned - full, target_grad, KIND)
        tl.store(aligned_sink + full + columns, grad.to(out.dtype.element_ty), mask=within)


def row_backward(
    logits: Tensor,  # [G, R, W]: the columns vocab_start .. vocab_start+W-1
    targets: Tensor,  # int64 [G*R] in the whole vocabulary; -1: the row's gradient is written as zeros
    logps: Tensor,  # [G*R]
    lse: Tensor,  # [G*R]
    entropy: Tensor | None,  # [G*R], needed with grad_entropy
    grad_logps: Tensor | None,  # [G*R]
    grad_entropy: Tensor | None,  # [G*R]
    transform: Transform,
    vocab_start: int,
    out: Tensor,  # [G, R, W], may be logits itself
) -> None:
    """out = d(sum grad_logps*logps + grad_entropy*entropy) / d(raw logits): as eager.row_backward."""
    rows, width = logits.shape[1:]
    count = targets.shape[0]
    if not count or not width:
        return
    plan = launch.backward_plan(logits, out, count)
    kind, inner, outer = launch.transform_arguments(transform)
    tensors = (logits, out, targets, logps, lse, None if grad_entropy is None else entropy, grad_logps, grad_entropy)
    strides = (logits.stride(0), logits.stride(1), out.stride(0), out.stride(1))
    slope = transform.logit_scale / transform.temperature
    launch.run(
        row_backward_kernel,
        count * plan.programs,
        launch.WARPS,
        (*tensors, rows, width, *strides, plan.programs, plan.span, vocab_start, inner, outer, slope),
        KIND=kind,
        PEEL=plan.peel,
        **plan.shape,
    )
