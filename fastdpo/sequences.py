"""Token logps to sequence logps: sums over sequences, and the weights of tokens in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .batch import IGNORE_INDEX, Layout, Reference, check_constant, constant, make_layout, shift_labels
from .inputs import check_token_logps
from .options import check_within, head_options
from .parallel import SequenceParallel, check_parallel


def sequence_logps(
    token_logps: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    token_weights: Tensor | None = None,
    ld_alpha: float | None = None,
    backend: str = "auto",
    sequence_parallel: SequenceParallel | None = None,
) -> Tensor:
    """Sums of token logps over the sequences of a pair batch, as the losses make them; differentiable.

    For a reference whose sums must be weighted as the policy's are.

    Args:
        token_logps: shaped like labels, from `token_logps` or `linear_token_logps` with the same labels and shift.
        labels, cu_seqlens, ignore_index, shift: as for `fastdpo.dpo_loss`.
        token_weights: weight of each label's logp, float, shaped like labels (and shifted with them; packed also
            `[1, N]`). What stands at an ignored label does not matter.
        ld_alpha: weight, in [0, 1], of the tokens beyond the shorter completion's length (LD-DPO, arXiv 2409.06411).
        backend: as for `fastdpo.token_logps`.
        sequence_parallel: as for `fastdpo.dpo_loss`.

    Returns:
        `[2B]`, chosen then rejected.

    Raises:
        TypeError, ValueError: tensors of another shape or type; a number outside its range.
    """
    head_options(ignore_index=ignore_index, shift=shift, backend=backend)
    check_parallel("sequence_parallel", sequence_parallel, SequenceParallel)
    layout = make_layout(labels, cu_seqlens, ignore_index, shift, sequence_parallel=sequence_parallel)
    check_token_logps("token_logps", token_logps, labels)
    if ld_alpha is not None:
        check_within("ld_alpha", ld_alpha, 0, 1)
    check_places(ld_alpha, sequence_parallel)
    logps = torch.where(layout.counted, token_logps.reshape(-1), 0.0)
    weights = position_weights(layout, logps, token_weights, ld_alpha, backend)
    return sequence_sums(logps if weights is None else logps * weights, layout, backend)


def reference_sums(
    ref_logps: Reference | None, layout: Layout, like: Tensor, weights: Tensor | None, backend: str
) -> Tensor | None:
    """The reference's sequence logps, `[2B]`, on the device and of the dtype of `like`; weights `[N]` are of tokens."""
    if ref_logps is None:
        return None
    logps = ref_logps.logps.to(like.device, like.dtype)
    if not ref_logps.per_token:
        return logps
    return sequence_sums(logps if weights is None else logps * weights, layout, backend)


def lengths(layout: Layout, like: Tensor, backend: str) -> Tensor:
    """The tokens that count in each sequence, `[S]`, in the dtype of `like`."""
    return sequence_sums(layout.counted.to(like.dtype), layout, backend)


def position_weights(
    layout: Layout, like: Tensor, token_weights: Tensor | None, ld_alpha: float | None, backend: str
) -> Tensor | None:
    """The weight of each position, `[N]`, in the dtype of `like`; None: all 1."""
    weights = None
    if token_weights is not None:
        check_constant("token_weights", token_weights, layout.per_token)
        weights = token_weights.to(layout.labels.device).reshape(layout.labels.shape)
        if layout.shifted:  # to the position that predicts the label
            weights = shift_labels(weights, 0, layout.bounds if layout.packed else None)
        # What stands at an ignored position does not matter, NaN neither
        weights = torch.where(layout.counted, weights.reshape(-1), 0.0)
        weights = constant("token_weights", weights, (weights.shape,), like)
    if ld_alpha is None:
        return weights
    # LD-DPO: the first min(|y_w|, |y_l|) tokens of both sides weigh 1, the rest ld_alpha
    counts = lengths(layout, like, backend)
    shared = torch.minimum(*counts.chunk(2)).repeat(2)
    nth = layout.counted.cumsum(0) - spread(counts.cumsum(0) - counts, layout.bounds, like.shape[0])
    verbose = (nth > spread(shared, layout.bounds, like.shape[0])).to(like.dtype)
    by_place = 1 - (1 - ld_alpha) * verbose
    return by_place if weights is None else weights * by_place


def check_places(ld_alpha: float | None, sequence_parallel: SequenceParallel | None) -> None:
    """Raise NotImplementedError for LD-DPO over split sequences."""
    if ld_alpha is not None and sequence_parallel is not None:
        raise NotImplementedError("ld_alpha: with sequence_parallel no rank knows a token's place in its completion")


def spread(values: Tensor, bounds: Tensor, positions: int) -> Tensor:
    """values `[S]` -> `[N]`: each position gets its sequence's value."""
    return torch.repeat_interleave(values, bounds.diff(), output_size=positions)


def sequence_sums(values: Tensor, layout: Layout, backend: str) -> Tensor:
    """values `[N]` -> sums `[S]` of whole sequences, over the ranks that hold their parts; differentiable."""
    sums = _SequenceSums.apply(values, layout.bounds, backend)
    return sums if layout.sequence_parallel is None else layout.sequence_parallel.sum(sums)


class _SequenceSums(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, bounds: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(bounds)
        ctx.positions = values.shape[0]
        return torch.ops.fastdpo.sequence_sums(values, bounds, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (bounds,) = ctx.saved_tensors
        return spread(grad, bounds, ctx.positions), None, None
