"""The fused pair kernel: sequence sums, sigmoid loss and slope in one launch.

The only code outside the losses that knows one of them: a second copy of `losses.sigmoid`, which tests hold it to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .batch import flat_targets, make_layout, make_reference
from .head import first_order
from .inputs import as_rows
from .losses import sigmoid
from .losses.recipe import Recipe
from .options import HeadOptions, check_number
from .sequences import reference_sums, spread


def fits(recipe: Recipe) -> bool:
    """Whether the recipe is the sigmoid loss with nothing but a beta and label_smoothing."""
    return (
        len(recipe.losses) == 1
        and recipe.losses[0].function is sigmoid
        and recipe.loss_weights[0] == 1
        and recipe.alpha == 0
        and recipe.betas is None
        and not isinstance(recipe.options.beta, Tensor)
        and (recipe.losses[0].gamma == 0 if recipe.gamma is None else _is_zero(recipe.gamma))
        and recipe.divergence is None
        and not recipe.averages
        and recipe.ld_alpha is None
        and not recipe.use_weighting
        and recipe.token_weights is None
        and recipe.pair_weights is None
    )


def _is_zero(gamma: float | Tensor) -> bool:
    return not isinstance(gamma, Tensor) and gamma == 0


class PairSigmoid(Function):
    """logps `[N]` -> loss `[]`, sequence logps `[2B]` (no gradient)."""

    @staticmethod
    def forward(
        ctx: Any,
        logps: Tensor,
        bounds: Tensor,
        ref: Tensor | None,  # [2B]
        beta: float,
        label_smoothing: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        loss, sums, slope = torch.ops.fastdpo.pair_sigmoid(logps, bounds, ref, beta, label_smoothing, backend)
        ctx.save_for_backward(bounds, slope)
        ctx.positions = logps.shape[0]
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        bounds, slope = ctx.saved_tensors
        return spread(grad * slope, bounds, ctx.positions), None, None, None, None, None


class DPOFunction(Function):
    """`DPOFunction.apply(logits, labels, ref_logps, beta) -> loss`: loss and gradient straight from logits.

    The bare drop-in for a padded batch, with the defaults of `dpo_loss`: logits `[2B, T, V]`, labels `[2B, T]`,
    ref_logps `[2B]` (or `[2B, T]`) or None.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ref_logps: Tensor | None = None, beta: float = 0.1) -> Tensor:
        check_number("beta", beta, above=0)
        options = HeadOptions()
        rows = as_rows(logits, labels)
        layout = make_layout(labels, None)
        reference_logps = make_reference(ref_logps, layout)
        targets = flat_targets(labels, logits.shape[-1])
        logps, lse = torch.ops.fastdpo.row_forward(rows, targets, *options.transform, [], options.backend)
        ref = reference_sums(reference_logps, layout, logps, None, options.backend)
        loss, _, slope = torch.ops.fastdpo.pair_sigmoid(logps, layout.bounds, ref, beta, 0.0, options.backend)
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
