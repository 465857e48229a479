"""The kernels in plain PyTorch: readable specification, fallback, and the tests' oracle.

Every backend has these functions with these signatures (backend.py). Symbols: z the transformed logits of a
row, y its target, p = softmax(z), lse = logsumexp(z).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import result_dtype
from .losses import LossOptions, Pairs, sigmoid
from .options import Transform
from .products import product

# Rows are done in blocks, so that the float32 copies stay small beside the logits
_BLOCK_ELEMENTS = 1 << 24


def unavailable() -> str | None:
    """Why this backend cannot run; None if it can."""
    return None


def transformed(raw: Tensor, transform: Transform) -> tuple[Tensor, Tensor | float]:
    """(z, dz/draw), both in the result dtype: z = softcap * tanh(raw * scale / softcap) / temperature."""
    scale, softcap, temperature = transform
    z = raw.to(result_dtype(raw.dtype))
    if softcap is None:
        return z * (scale / temperature), scale / temperature
    t = torch.tanh(z * (scale / softcap))
    # d tanh(x)/dx = 1 - tanh(x)^2
    return t * (softcap / temperature), (1 - t * t) * (scale / temperature)


def row_forward(
    logits: Tensor,  # [G, R, V], float32 / bf16 / fp16 / float64; inner stride 1, any strides outside
    # int64 [G*R]; -1: the row is not read, and all its results are 0. V: the target is on another rank (parallel.py),
    # its logit counts as 0 here, and is_top1 means nothing
    targets: Tensor,
    transform: Transform,
    stats: tuple[str, ...],  # among entropy, mean_logits, is_top1, log_sum_sq_probs
) -> list[Tensor]:
    """logps, lse and the stats asked for, in their order, each `[G*R]` float32 (is_top1: bool)."""
    _groups, rows, vocab = logits.shape
    dtype = result_dtype(logits.dtype)
    names = ("logps", "lse", *stats)
    out = [targets.new_zeros(targets.shape, dtype=torch.bool if n == "is_top1" else dtype) for n in names]
    for block in _row_blocks(targets, vocab):
        z, _ = transformed(logits[block // rows, block % rows], transform)
        y = targets[block]
        target_z = z.gather(1, y[:, None].clamp(max=vocab - 1)).squeeze(1).masked_fill(y >= vocab, 0)
        lse = torch.logsumexp(z, dim=1)
        for name, result in zip(names, out, strict=True):
            if name == "logps":
                value = target_z - lse
            elif name == "lse":
                value = lse
            elif name == "mean_logits":
                value = z.mean(dim=1)
            elif name == "is_top1":
                value = z.argmax(dim=1) == y  # ties: the first maximum counts
            elif name == "entropy":
                # H = -sum_v p_v log p_v; where p_v = 0 the term is 0, also for z_v = -inf
                log_p = z - lse[:, None]
                p = log_p.exp()
                value = -torch.where(p == 0, 0.0, p * log_p).sum(dim=1)
            elif name == "log_sum_sq_probs":
                value = torch.logsumexp(2 * z, dim=1) - 2 * lse
            else:
                raise ValueError(f"stats: the row kernels do not know {name!r}")
            result[block] = value
    return out


def row_backward(
    logits: Tensor,  # [G, R, W]: the columns vocab_start .. vocab_start+W-1
    targets: Tensor,  # int64 [G*R] in the whole vocabulary; -1: the row's gradient is written as zeros
    logps: Tensor,  # [G*R]; kernels take the target's probability from here: in place, its logit may be overwritten
    lse: Tensor,  # [G*R]
    entropy: Tensor | None,  # [G*R], needed with grad_entropy
    grad_logps: Tensor | None,  # [G*R]
    grad_entropy: Tensor | None,  # [G*R]
    transform: Transform,
    vocab_start: int,
    out: Tensor,  # [G, R, W], may be logits itself
) -> None:
    """out = d(sum grad_logps*logps + grad_entropy*entropy) / d(raw logits)."""
    rows, width = logits.shape[1:]
    for group in range(logits.shape[0]):
        out[group][targets[group * rows : (group + 1) * rows] < 0] = 0
    for block in _row_blocks(targets, width):
        z, slope = transformed(logits[block // rows, block % rows], transform)
        log_p = z - lse[block, None]
        p = log_p.exp()
        grad = torch.zeros_like(z)
        if grad_logps is not None:
            # d(logp)/dz_j = 1[j = y] - p_j
            local = targets[block] - vocab_start
            here = ((local >= 0) & (local < width)).nonzero().squeeze(1)
            grad -= grad_logps[block, None] * p
            grad[here, local[here]] += grad_logps[block][here]
        if grad_entropy is not None:
            assert entropy is not None
            # d(H)/dz_j = -p_j * (log p_j + H)
            term = torch.where(p == 0, 0.0, p * (log_p + entropy[block, None]))
            grad -= grad_entropy[block, None] * term
        out[block // rows, block % rows] = (grad * slope).to(out.dtype)


def _row_blocks(targets: Tensor, vocab: int) -> tuple[Tensor, ...]:
    """The indices of the rows that count, in blocks of about _BLOCK_ELEMENTS logits."""
    counted = (targets >= 0).nonzero().squeeze(1)
    return counted.split(max(1, _BLOCK_ELEMENTS // max(1, vocab))) if len(counted) else ()


def column_mass(logits: Tensor, lse: Tensor, transform: Transform) -> Tensor:
    """logits `[n, V]`, lse `[n]` -> the probability that each column holds over the rows, `[V]`."""
    mass = lse.new_zeros(logits.shape[1])
    for block, block_lse in zip(logits.split(64), lse.split(64), strict=True):
        mass += (transformed(block, transform)[0] - block_lse[:, None]).exp().sum(0)
    return mass


def column_probs(logits: Tensor, lse: Tensor, columns: Tensor, transform: Transform) -> tuple[Tensor, Tensor]:
    """logits `[n, V]`, lse `[n]`, columns int32 `[k]` -> softmax of those columns, `[k, n]` in logits' dtype; and the
    probability outside of them, `[n]`, from before that rounding."""
    z, _ = transformed(logits[:, columns], transform)
    p = (z - lse[:, None]).exp()
    dropped = (1 - p.sum(1, dtype=torch.float64)).clamp(min=0).to(p.dtype)
    return p.t().to(logits.dtype, memory_format=torch.contiguous_format), dropped


def compact_gradient(
    probs: Tensor,  # [k, n]
    columns: Tensor,  # int32 [k], ascending: the columns of probs
    targets: Tensor,  # int64 [n]; one not among columns has no one-hot here
    logps: Tensor,  # [n]
    lse: Tensor,  # [n]
    grad_logps: Tensor,  # [n]
    transform: Transform,
) -> Tensor:
    """d(sum grad_logps*logps) / d(raw logits[:, columns]), transposed: `[k, n]` in the dtype of probs."""
    p = probs.to(result_dtype(probs.dtype))
    # d(logp)/dz_j = 1[j = y] - p_j
    grad = -grad_logps * p
    slot = torch.searchsorted(columns, targets.to(columns.dtype)).clamp(max=len(columns) - 1)
    here = (columns[slot] == targets).nonzero().squeeze(1) if len(columns) else slot[:0]
    # the target's own probability from the saved logp, which is exact
    grad[slot[here], here] = (grad_logps * (1 - logps.exp()))[here]
    slope = transform.logit_scale / transform.temperature
    if transform.softcap is None:
        return (grad * slope).to(probs.dtype)
    # tanh from z = log p + lse; where p rounded to 0 its gradient is 0 whatever the slope
    z = p.log() + lse
    z[slot[here], here] = (logps + lse)[here]
    t = (z * (transform.temperature / transform.softcap)).clamp(-1, 1)
    return (grad * slope * (1 - t * t)).to(probs.dtype)


def add_weight_gradient(total: Tensor, slots: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total `[., H]` rows slots `[k]` += grad `[k, n]` @ hidden `[n, H]`; no slot twice. total: float32 or float64."""
    total.index_add_(0, slots, product(grad, hidden).to(total.dtype))


def sequence_sums(values: Tensor, bounds: Tensor) -> Tensor:
    """values `[N]`, bounds int64 `[S+1]` -> the sum of each sequence `[S]`; summed in float64, 0 where empty."""
    total = torch.segment_reduce(values.double(), "sum", lengths=bounds.diff(), initial=0, unsafe=True)
    return total.to(values.dtype)


def pair_sigmoid(
    logps: Tensor,  # [N] token logps
    bounds: Tensor,  # int64 [2B+1]
    ref_logps: Tensor | None,  # [2B]; None: reference-free
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence sums, mean sigmoid loss and its slope in one call.

    Returns loss `[]`, sequence logps `[2B]`, slope `[2B]` = d loss / d sequence logp. The mathematics is
    `losses.sigmoid`; kernels of other backends must equal this.
    """
    sums = sequence_sums(logps, bounds)
    if len(sums) == 0:  # no pairs: the loss is 0, as an empty batch's gradient
        return sums.new_zeros(()), sums, sums.clone()
    pairs = Pairs.split(sums, ref_logps, torch.ones_like(sums))
    loss = sigmoid(pairs, LossOptions(beta=beta, label_smoothing=label_smoothing)).mean()
    # d loss / d chosen logp = -beta * ((1-eps) * sigmoid(-beta h) - eps * sigmoid(beta h)) / B;  rejected: the negative
    reward_margin = beta * pairs.margin
    slope = (1 - label_smoothing) * torch.sigmoid(-reward_margin) - label_smoothing * torch.sigmoid(reward_margin)
    chosen = slope * (-beta / len(slope))
    return loss, sums, torch.cat([chosen, -chosen])
