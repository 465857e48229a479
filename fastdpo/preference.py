"""A pair batch to its loss: labels and layout (batch.py) -> token logps (head.py) -> loss (losses.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from .batch import IGNORE_INDEX, flat_targets, reference, sequence_bounds, shift_labels
from .head import TokenLogps, first_order, linear_token_logps, token_logps
from .inputs import as_rows
from .losses import LOSSES, LossOptions, Pairs, check_loss
from .options import HeadOptions, head_options


class PreferenceOutput(NamedTuple):
    """What a preference loss returns. All but `loss` and `stats.logps` / `stats.entropy` are detached."""

    loss: Tensor  # [], mean over pairs
    chosen_logps: Tensor  # [B] sequence logps
    rejected_logps: Tensor  # [B]
    chosen_rewards: Tensor  # [B] beta * (chosen_logps - reference)
    rejected_rewards: Tensor  # [B]
    stats: TokenLogps  # per token, shaped like labels


def dpo_loss(
    logits: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    stats: Sequence[str] = (),
    inplace_backward: bool = False,
    backend: str = "auto",
) -> PreferenceOutput:
    """DPO loss (arXiv 2305.18290, eq. 7) from logits.

    Args:
        logits: padded `[2B, T, V]`, or packed `[N, V]` or `[1, N, V]` with cu_seqlens.
        labels: `[2B, T]`, or packed `[N]` or `[1, N]`; sequences 0..B-1 chosen, B..2B-1 rejected.
        ref_logps: reference sequence logps, float `[2B]` in the same order, detached; None: the reference-free loss.
        beta: strength of the KL constraint, above 0.
        loss_type: a name in `fastdpo.losses.LOSSES`.
        label_smoothing: probability that a preference is noise, in [0, 0.5) (cDPO).
        cu_seqlens: int32 `[2B+1]`, the packed batch's boundaries: starts at 0, ends at N.
        The other keywords: `token_logps`. With shift and cu_seqlens, no sequence predicts into the next.

    Raises:
        TypeError, ValueError: as `token_logps`; an odd batch; ref_logps of another shape or not finite; cu_seqlens
            that does not start at 0, end at N and rise; an unknown loss; an option that the loss does not use.
    """
    options = LossOptions(beta, label_smoothing)
    check_loss(loss_type, options)
    labels, bounds, ref = _layout(labels, ref_logps, cu_seqlens, ignore_index, shift)
    tokens = token_logps(
        logits,
        labels,
        ignore_index=ignore_index,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        stats=stats,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    return _preference(tokens, labels, bounds, ref, loss_type, options, ignore_index, backend)


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    stats: Sequence[str] = (),
    grad_tol: float | str = "auto",
    workspace_mb: float = 256,
    backend: str = "auto",
) -> PreferenceOutput:
    """DPO loss from hidden states: hidden padded `[2B, T, H]`, or packed `[N, H]` or `[1, N, H]`; weight `[V, H]`.

    The other arguments and errors: `dpo_loss` and `linear_token_logps`.
    """
    options = LossOptions(beta, label_smoothing)
    check_loss(loss_type, options)
    labels, bounds, ref = _layout(labels, ref_logps, cu_seqlens, ignore_index, shift)
    tokens = linear_token_logps(
        hidden,
        weight,
        labels,
        bias=bias,
        ignore_index=ignore_index,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        stats=stats,
        grad_tol=grad_tol,
        workspace_mb=workspace_mb,
        backend=backend,
    )
    return _preference(tokens, labels, bounds, ref, loss_type, options, ignore_index, backend)


class DPOLoss(nn.Module):
    """`dpo_loss` as a module: the keywords at construction, the tensors at the call."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        _check_keywords(dpo_loss, keywords)
        self.keywords = keywords

    def forward(
        self, logits: Tensor, labels: Tensor, ref_logps: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> PreferenceOutput:
        """See `dpo_loss`."""
        return dpo_loss(logits, labels, ref_logps, cu_seqlens=cu_seqlens, **self.keywords)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.keywords.items())


class LinearDPOLoss(DPOLoss):
    """`linear_dpo_loss` as a module. The LM head's weight and bias stay the model's: pass them at the call."""

    def __init__(self, **keywords: Any) -> None:
        nn.Module.__init__(self)
        _check_keywords(linear_dpo_loss, keywords)
        self.keywords = keywords

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ref_logps: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> PreferenceOutput:
        """See `linear_dpo_loss`."""
        return linear_dpo_loss(hidden, weight, labels, ref_logps, bias=bias, cu_seqlens=cu_seqlens, **self.keywords)


class DPOFunction(Function):
    """`DPOFunction.apply(logits, labels, ref_logps, beta) -> loss`: loss and gradient straight from logits.

    The bare drop-in for a padded batch, with the defaults of `dpo_loss`: logits `[2B, T, V]`, labels `[2B, T]`,
    ref_logps `[2B]` or None.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ref_logps: Tensor | None = None, beta: float = 0.1) -> Tensor:
        check_loss("sigmoid", LossOptions(beta))
        options = HeadOptions()
        rows = as_rows(logits, labels)
        bounds = sequence_bounds(labels, None)
        ref = reference(ref_logps, labels.shape[0])
        targets = flat_targets(labels, logits.shape[-1])
        logps, lse = torch.ops.fastdpo.row_forward(rows, targets, *options.transform, [], options.backend)
        ref = None if ref is None else ref.to(logps.device, logps.dtype)
        loss, _, slope = torch.ops.fastdpo.pair_sigmoid(logps, bounds, ref, beta, 0.0, options.backend)
        ctx.save_for_backward(rows, targets, logps, lse, slope)
        ctx.options, ctx.shape = options, logits.shape
        return loss

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, targets, logps, lse, slope = ctx.saved_tensors
        # d loss / d logp[i] = slope of its sequence
        per_token = (grad * slope)[:, None].expand(-1, ctx.shape[1]).reshape(-1).contiguous()
        out = torch.ops.fastdpo.row_backward(
            rows, targets, logps, lse, None, per_token, None, *ctx.options.transform, ctx.options.backend
        )
        return out.view(ctx.shape), None, None, None


# --- token logps -> loss ---------------------------------------------------------------------------------------------


class _SequenceSums(Function):
    """values `[N]`, bounds `[S+1]` -> sums `[S]`"""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bounds: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(bounds)
        ctx.positions = values.shape[0]
        return torch.ops.fastdpo.sequence_sums(values, bounds, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (bounds,) = ctx.saved_tensors
        return _spread(grad, bounds, ctx.positions), None, None


class _PairSigmoid(Function):
    """logps `[N]` -> loss `[]`, sequence logps `[2B]` (no gradient): sums, loss and slope in one launch."""

    @staticmethod
    def forward(
        ctx: Any, logps: Tensor, bounds: Tensor, ref: Tensor | None, options: LossOptions, backend: str
    ) -> tuple[Tensor, Tensor]:
        loss, sums, slope = torch.ops.fastdpo.pair_sigmoid(logps, bounds, ref, *options, backend)
        ctx.save_for_backward(bounds, slope)
        ctx.positions = logps.shape[0]
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        bounds, slope = ctx.saved_tensors
        return _spread(grad * slope, bounds, ctx.positions), None, None, None, None


def _spread(values: Tensor, bounds: Tensor, positions: int) -> Tensor:
    """values `[S]` -> `[N]`: each position gets its sequence's value."""
    return torch.repeat_interleave(values, bounds.diff(), output_size=positions)


def _layout(
    labels: Tensor, ref_logps: Tensor | None, cu_seqlens: Tensor | None, ignore_index: int, shift: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(labels aligned with their rows, bounds `[2B+1]`, checked reference `[2B]`)"""
    bounds = sequence_bounds(labels, cu_seqlens)
    ref = reference(ref_logps, bounds.shape[0] - 1)
    if shift:
        labels = shift_labels(labels, ignore_index, None if cu_seqlens is None else bounds)
    return labels, bounds, ref


def _preference(
    tokens: TokenLogps,
    labels: Tensor,
    bounds: Tensor,
    ref: Tensor | None,
    loss_type: str,
    options: LossOptions,
    ignore_index: int,
    backend: str,
) -> PreferenceOutput:
    logps = tokens.logps.reshape(-1)
    ref = None if ref is None else ref.to(logps.device, logps.dtype)
    if loss_type == "sigmoid":
        loss, sums = _PairSigmoid.apply(logps, bounds, ref, options, backend)
    else:
        sums = _SequenceSums.apply(logps, bounds, backend)
        counted = (labels.reshape(-1) != ignore_index).to(logps.dtype)
        lengths = torch.ops.fastdpo.sequence_sums(counted, bounds, backend)
        losses = LOSSES[loss_type](Pairs.split(sums, ref, lengths), options)
        loss = losses.sum() / max(1, losses.shape[0])
    sums = sums.detach()
    rewards = options.beta * (sums if ref is None else sums - ref)
    pairs = sums.shape[0] // 2
    return PreferenceOutput(loss, sums[:pairs], sums[pairs:], rewards[:pairs], rewards[pairs:], tokens)


def _check_keywords(function: Any, keywords: dict[str, Any]) -> None:
    """Raise at construction for what would raise at the call: unknown keywords and bad values."""
    known = set(function.__kwdefaults__) - {"bias", "cu_seqlens"}
    unknown = sorted(set(keywords) - known)
    if unknown:
        raise TypeError(
            f"{unknown[0]}: not a keyword of {function.__name__}; expected some of {', '.join(sorted(known))}"
        )
    keywords = function.__kwdefaults__ | keywords
    check_loss(keywords["loss_type"], LossOptions(keywords["beta"], keywords["label_smoothing"]))
    head_options(**{name: keywords[name] for name in known - {"beta", "loss_type", "label_smoothing"}})
