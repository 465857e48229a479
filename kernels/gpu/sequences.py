"""Sequence kernels: token log-probabilities to sequence sums, and the sigmoid loss of pairs with its slope.

    l_s = sum of the logps of sequence s                 h_b = (l_b - ref_b) - (l_{B+b} - ref_{B+b})
    loss = mean_b -(1-eps) log sigmoid(beta h_b) - eps log sigmoid(-beta h_b)
    d loss / d l_b = -(beta/B) ((1-eps) sigmoid(-beta h_b) - eps sigmoid(beta h_b)) = -(d loss / d l_{B+b})

values [N], bounds [S+1] -> sums [S]. Bytes: 4 N, and a few scalars a sequence: launches, not bytes, are the cost, so
the pair kernel does it all in one. The mean over pairs is left to torch.mean, which is deterministic; atomics are not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .row_math import LOG2E


@triton.jit
def sequence_sum(values, begin, end, BLOCK: tl.constexpr):
    """Summed in float64: as many lanes as BLOCK, merged once."""
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        columns = start + offsets
        total += tl.load(values + columns, mask=columns < end, other=0.0).to(tl.float32).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def sequence_sums_kernel(values, bounds, sums, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    total = sequence_sum(values, tl.load(bounds + sequence), tl.load(bounds + sequence + 1), BLOCK)
    tl.store(sums + sequence, total.to(tl.float32).to(sums.dtype.element_ty))


@triton.jit
def log1p_small(x):
    """log(1 + x) for x in [0, 1], within a few ulp: 2 atanh(x / (2 + x)). tl.log(1 + x) would round a small x away."""
    r = x / (2 + x)
    y = r * r
    series = tl.fma(y, 1 / 15, 1 / 13)
    series = tl.fma(series, y, 1 / 11)
    series = tl.fma(series, y, 1 / 9)
    series = tl.fma(series, y, 1 / 7)
    series = tl.fma(series, y, 1 / 5)
    series = tl.fma(series, y, 1 / 3)
    series = tl.fma(series, y, 1.0)
    return 2 * r * series


@triton.jit(do_not_specialize=["pairs"])
def pair_sigmoid_kernel(
    logps,  # [N]
    bounds,  # int64 [2B+1]
    ref_logps,  # [2B] or None
    losses,  # [B]
    sums,  # [2B]
    slopes,  # [2B]
    pairs,  # B
    beta,
    label_smoothing,
    BLOCK: tl.constexpr,
):
    chosen = tl.program_id(0)
    rejected = pairs + chosen
    chosen_sum = sequence_sum(logps, tl.load(bounds + chosen), tl.load(bounds + chosen + 1), BLOCK).to(tl.float32)
    rejected_sum = sequence_sum(logps, tl.load(bounds + rejected), tl.load(bounds + rejected + 1), BLOCK).to(tl.float32)
    tl.store(sums + chosen, chosen_sum)
    tl.store(sums + rejected, rejected_sum)
    if ref_logps is None:
        margin = chosen_sum - rejected_sum
    else:
        chosen_ratio = chosen_sum - tl.load(ref_logps + chosen).to(tl.float32)
        margin = chosen_ratio - (rejected_sum - tl.load(ref_logps + rejected).to(tl.float32))
    h = margin * beta
    # With u = exp(-|h|) <= 1 nothing overflows: -log sigmoid(h) = max(-h, 0) + log(1 + u)
    u = tl.exp2(-tl.abs(h) * LOG2E)
    log1p = log1p_small(u)
    loss = (1 - label_smoothing) * (tl.maximum(-h, 0.0) + log1p) + label_smoothing * (tl.maximum(h, 0.0) + log1p)
    tl.store(losses + chosen, loss)
    more, less = 1 / (1 + u), u / (1 + u)  # sigmoid(|h|), sigmoid(-|h|)
    rises, falls = tl.where(h >= 0, more, less), tl.where(h >= 0, less, more)  # sigmoid(h), sigmoid(-h)
    pull = ((1 - label_smoothing) * falls - label_smoothing * rises) * (beta / pairs)
    tl.store(slopes + chosen, -pull)
    tl.store(slopes + rejected, pull)


def sequence_sums(values: Tensor, bounds: Tensor) -> Tensor:
    """values `[N]`, bounds int64 `[S+1]` -> the sum of each sequence `[S]`, 0 where empty: as eager.sequence_sums."""
    sequences = bounds.shape[0] - 1
    sums = values.new_empty(sequences)
    if sequences:
        launch.run(
            sequence_sums_kernel,
            sequences,
            launch.WARPS,
            (values.contiguous(), bounds, sums),
            BLOCK=launch.SEQUENCE_BLOCK,
        )
    return sums


def pair_sigmoid(
    logps: Tensor,  # [N] token logps
    bounds: Tensor,  # int64 [2B+1]
    ref_logps: Tensor | None,  # [2B]; None: reference-free
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss `[]`, sequence logps `[2B]`, slope `[2B]` = d loss / d sequence logp: as eager.pair_sigmoid."""
    pairs = (bounds.shape[0] - 1) // 2
    losses, sums, slope = (logps.new_empty(size, dtype=torch.float32) for size in (pairs, 2 * pairs, 2 * pairs))
    if not pairs:
        return losses.sum(), sums, slope
    arguments = (logps.contiguous(), bounds, None if ref_logps is None else ref_logps.contiguous(), losses, sums, slope)
    launch.run(
        pair_sigmoid_kernel,
        pairs,
        launch.WARPS,
        (*arguments, pairs, float(beta), float(label_smoothing)),
        BLOCK=launch.SEQUENCE_BLOCK,
    )
    return losses.mean(), sums, slope
