"""Forward row kernel: log-probability of the target and row statistics, reading each logit once.

    lse = m + log s,  s = sum_v exp(z_v - m)                          logp = z_y - lse
    entropy = log s - sum_v p_v (z_v - m)                             mean_logits = sum_v z_v / V
    log_sum_sq_probs = log sum_v exp(z_v - m)^2 - 2 log s             is_top1: z_y = m and no z_v = m with v < y

logits [G, R, V] -> each result [G*R]. Bytes: V * itemsize a row, and a few scalars.

The sums are online (row_state.py). Where rows are few, `splits` programs share a row, and a second kernel merges their
states.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.options import Transform

from . import launch
from .row_math import LN2, LOG2E, NO_MAX, aligned_part, edge_columns, row_start, transformed
from .row_state import STATE, absorb, lane_max, merged

# Specialising on their divisibility or on 1 would compile anew as batches vary, and gain nothing: alignment is PEEL's
INTEGERS = ("rows", "vocab", "stride_g", "stride_r", "splits", "span")


@triton.jit
def finish(row, z_y, vocab, state, logps, lse, entropy, mean_logits, is_top1, log_sum_sq_probs):
    """Write a row's results from its merged state. Results not asked for are None."""
    m, ref, s, t, q, a, earlier = state
    log2_s = tl.log2(s)
    # ref is m * log2e rounded; what rounding took is known exactly, and matters where |z| is large
    rounded = tl.where(m == NO_MAX, 0.0, tl.fma(m, LOG2E, -ref))
    log_s = (log2_s - rounded) * LN2
    tl.store(lse + row, m + log_s)
    tl.store(logps + row, (z_y - m) - log_s)
    if entropy is not None:
        tl.store(entropy + row, (log2_s - t / s) * LN2)
    if mean_logits is not None:
        tl.store(mean_logits + row, a / vocab)
    if is_top1 is not None:
        tl.store(is_top1 + row, ((z_y >= m) & (earlier < z_y)).to(tl.int8))
    if log_sum_sq_probs is not None:
        tl.store(log_sum_sq_probs + row, (tl.log2(q) - 2 * log2_s) * LN2)


@triton.jit
def finish_masked(row, logps, lse, entropy, mean_logits, is_top1, log_sum_sq_probs):
    tl.store(logps + row, 0.0)
    tl.store(lse + row, 0.0)
    if entropy is not None:
        tl.store(entropy + row, 0.0)
    if mean_logits is not None:
        tl.store(mean_logits + row, 0.0)
    if is_top1 is not None:
        tl.store(is_top1 + row, 0)
    if log_sum_sq_probs is not None:
        tl.store(log_sum_sq_probs + row, 0.0)


@triton.jit(do_not_specialize=INTEGERS)
def row_forward_kernel(
    logits,  # [G, R, V]
    targets,  # int64 [G*R]
    partials,  # float32 [STATE, G*R, splits]; None: one program a row
    logps,  # float32 [G*R], and so on; None: not asked for
    lse,
    entropy,
    mean_logits,
    is_top1,  # int8
    log_sum_sq_probs,
    rows,  # R
    vocab,
    stride_g,
    stride_r,
    splits,  # programs a row
    span,  # columns a program, a multiple of BLOCK
    inner,
    outer,
    KIND: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN: tl.constexpr,
    TOP1: tl.constexpr,
    SQUARES: tl.constexpr,
    PEEL: tl.constexpr,  # rows may start or end off 16 bytes
    VEC: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    K: tl.constexpr = BLOCK // (LANES * VEC)
    program = tl.program_id(0)
    row = program // splits
    split = program - row * splits
    y = tl.load(targets + row).to(tl.int32)
    if y < 0:
        if partials is None:
            finish_masked(row, logps, lse, entropy, mean_logits, is_top1, log_sum_sq_probs)
        return
    pointer = logits + row_start(row, rows, stride_g, stride_r)
    head, body = aligned_part(pointer, vocab, PEEL, VEC)
    # A target of V is on another rank (fastdpo/parallel.py): its logit counts as 0, of which every transform makes 0
    z_y = transformed(tl.load(pointer + y, mask=y < vocab, other=0.0).to(tl.float32), inner, outer, KIND)[0]

    if PEEL:  # issued before the main loop, used after it
        # The row's first program does them all
        edges, at_edge = edge_columns(head, body, tl.where(split == 0, vocab, 0), LANES, VEC)
        raw_edges = tl.load(pointer + edges, mask=at_edge, other=0.0)

    # A hint on pointer + 0, or on a helper's argument, would be folded away
    aligned = tl.multiple_of(pointer + head, 16) if PEEL else tl.multiple_of(pointer, 16)
    y_aligned = y - head
    begin = tl.multiple_of(split * span, BLOCK)
    end = tl.multiple_of(tl.maximum(begin, tl.minimum(begin + span, body)), VEC)
    full = begin + (end - begin) // BLOCK * BLOCK
    columns = tl.arange(0, BLOCK)
    lowest = tl.full([LANES], NO_MAX, tl.float32)
    zero = tl.zeros([LANES], tl.float32)
    state = (lowest, lowest, zero, zero, zero, zero, lowest)

    for start in range(begin, full, BLOCK):
        raw = tl.load(aligned + start + columns).to(tl.float32)
        z = transformed(raw, inner, outer, KIND)[0]
        z = tl.reshape(z, [K, LANES, VEC])
        state = absorb(state, z, None, None, ENTROPY, MEAN, SQUARES)
        if TOP1:  # only the block that holds the target compares columns
            m, ref, s, t, q, a, earlier = state
            if start + BLOCK <= y_aligned:
                earlier = m
            elif start <= y_aligned:
                before = tl.reshape(columns < y_aligned - start, [K, LANES, VEC])
                earlier = tl.maximum(earlier, lane_max(tl.where(before, z, NO_MAX)))
            state = (m, ref, s, t, q, a, earlier)

    if full < end:
        within = columns < end - full
        raw = tl.load(aligned + full + columns, mask=within, other=0.0).to(tl.float32)
        z = transformed(raw, inner, outer, KIND)[0]
        z = tl.where(within, z, NO_MAX)  # after the transform: a softcap makes -inf finite
        z = tl.reshape(z, [K, LANES, VEC])
        counted = tl.reshape(within, [K, LANES, VEC])
        if TOP1:
            before = tl.reshape(columns < y_aligned - full, [K, LANES, VEC])
            state = absorb(state, z, counted, before, ENTROPY, MEAN, SQUARES)
        else:
            state = absorb(state, z, counted, None, ENTROPY, MEAN, SQUARES)

    if PEEL:
        z = transformed(raw_edges.to(tl.float32), inner, outer, KIND)[0]
        z = tl.reshape(tl.where(at_edge, z, NO_MAX), [1, LANES, 1])
        counted = tl.reshape(at_edge, [1, LANES, 1])
        if TOP1:
            before = tl.reshape(edges < y, [1, LANES, 1])
            state = absorb(state, z, counted, before, ENTROPY, MEAN, SQUARES)
        else:
            state = absorb(state, z, counted, None, ENTROPY, MEAN, SQUARES)

    state = merged(state)
    if partials is None:
        finish(row, z_y, vocab, state, logps, lse, entropy, mean_logits, is_top1, log_sum_sq_probs)
    else:
        plane = tl.num_programs(0).to(tl.int64)  # G*R * splits
        for i in tl.static_range(STATE):
            tl.store(partials + i * plane + program, state[i])


@triton.jit(do_not_specialize=INTEGERS[:-1])
def row_combine_kernel(
    logits,
    targets,
    partials,  # float32 [STATE, G*R, splits]
    logps,
    lse,
    entropy,
    mean_logits,
    is_top1,
    log_sum_sq_probs,
    rows,
    vocab,
    stride_g,
    stride_r,
    splits,
    inner,
    outer,
    KIND: tl.constexpr,
    SPLITS: tl.constexpr,  # power of two >= splits
):
    row = tl.program_id(0)
    y = tl.load(targets + row).to(tl.int32)
    if y < 0:
        finish_masked(row, logps, lse, entropy, mean_logits, is_top1, log_sum_sq_probs)
        return
    raw = tl.load(logits + row_start(row, rows, stride_g, stride_r) + y, mask=y < vocab, other=0.0)
    z_y = transformed(raw.to(tl.float32), inner, outer, KIND)[0]
    split = tl.arange(0, SPLITS)
    there = split < splits
    partial = partials + row.to(tl.int64) * splits + split
    plane = tl.num_programs(0).to(tl.int64) * splits
    m = tl.load(partial, mask=there, other=NO_MAX)
    ref = tl.load(partial + plane, mask=there, other=NO_MAX)
    s = tl.load(partial + 2 * plane, mask=there, other=0.0)
    t = tl.load(partial + 3 * plane, mask=there, other=0.0)
    q = tl.load(partial + 4 * plane, mask=there, other=0.0)
    a = tl.load(partial + 5 * plane, mask=there, other=0.0)
    earlier = tl.load(partial + 6 * plane, mask=there, other=NO_MAX)
    state = merged((m, ref, s, t, q, a, earlier))
    finish(row, z_y, vocab, state, logps, lse, entropy, mean_logits, is_top1, log_sum_sq_probs)


STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def row_forward(
    logits: Tensor,  # [G, R, V]; inner stride 1, any strides outside
    targets: Tensor,  # int64 [G*R]; as eager.row_forward
    transform: Transform,
    stats: tuple[str, ...],
) -> list[Tensor]:
    """logps, lse and the stats asked for: as eager.row_forward."""
    for name in stats:
        if name not in STATS:
            raise ValueError(f"stats: the row kernels do not know {name!r}")
    _, rows, vocab = logits.shape
    count = targets.shape[0]
    found: dict[str, Tensor] = {
        name: targets.new_empty(count, dtype=torch.bool if name == "is_top1" else torch.float32)
        for name in ("logps", "lse", *stats)
    }
    if count:
        plan = launch.forward_plan(logits, count)
        outputs = [_bytes(found.get(name)) for name in ("logps", "lse", *STATS)]
        kind, inner, outer = launch.transform_arguments(transform)
        strides = (rows, vocab, logits.stride(0), logits.stride(1))
        partials = None
        if plan.programs > 1:
            partials = targets.new_empty((STATE.value, count, plan.programs), dtype=torch.float32)
        launch.run(
            row_forward_kernel,
            count * plan.programs,
            launch.WARPS,
            (logits, targets, partials, *outputs, *strides, plan.programs, plan.span, inner, outer),
            KIND=kind,
            **{flag: name in found for flag, name in zip(("ENTROPY", "MEAN", "TOP1", "SQUARES"), STATS, strict=True)},
            PEEL=plan.peel,
            **plan.shape,
        )
        if partials is not None:
            launch.run(
                row_combine_kernel,
                count,
                launch.COMBINE_WARPS,
                (logits, targets, partials, *outputs, *strides, plan.programs, inner, outer),
                KIND=kind,
                SPLITS=triton.next_power_of_2(plan.programs),
            )
    return list(found.values())


def _bytes(result: Tensor | None) -> Tensor | None:
    """A bool result as the int8 that kernels store."""
    return result.view(torch.int8) if result is not None and result.dtype == torch.bool else result
