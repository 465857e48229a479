"""Liger: `LigerFusedLinear{DPO,CPO,SimPO,ORPO,KTO}Loss` of liger-kernel 0.8.5 by fastdpo's head.

Same constructors, same calls, same returned values; change the import:

    from fastdpo.integrations.liger import LigerFusedLinearDPOLoss    # was liger_kernel.chunked_loss

`compiled` and `chunk_size` are accepted and mean nothing: nothing is compiled, and memory does not depend on a chunk.
What differs from Liger: every loss that `fastdpo.linear_dpo_loss` knows is a `loss_type`; label_smoothing in sigmoid
is cDPO's, and an option that a loss does not use raises, where Liger ignores both; an average over an empty completion
is 0 and not NaN. Liger itself need not be installed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..head import linear_token_logps
from ..losses import Pairs
from ..losses.keywords import LossKeywords, check_keywords
from ..losses.margin import log_odds_ratio
from ..preference import PreferenceOutput, linear_dpo_loss
from ..unpaired import linear_unpaired_loss

Auxiliary = tuple[Tensor, ...]

# --- the functions: Liger's autograd Functions, of which only `apply` is public ---------------------------------------


class LigerFusedLinearDPOFunction:
    """DPO's losses. Returns loss `[]` and (chosen_logps `[B]`, rejected_logps `[B]`, chosen_logits_mean `[]`,
    rejected_logits_mean `[]`, nll_loss `[]`, chosen_rewards `[B]`, rejected_rewards `[B]`); all but the loss detached.
    """

    @staticmethod
    def apply(
        _input: Tensor,  # [2B, T, H]
        weight: Tensor,  # [V, H]
        target: Tensor,  # [2B, T], rows 0..B-1 chosen
        bias: Tensor | None = None,  # [V]
        ref_input: Tensor | None = None,  # [2B, T, H']
        ref_weight: Tensor | None = None,  # [V, H']
        ref_bias: Tensor | None = None,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        alpha: float = 1.0,
    ) -> tuple[Tensor, Auxiliary]:
        """See `linear_dpo_loss` for the errors; ValueError also for use_ref_model without ref_input."""
        ref = _reference_logps(use_ref_model, ref_input, ref_weight, target, ref_bias, ignore_index)
        options = dict(
            beta=beta,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            discopop_tau=discopop_tau,
            length_normalize=average_log_prob,
            alpha=alpha if compute_nll_loss else 0.0,
        )
        out = linear_dpo_loss(_input, weight, target, ref, bias=bias, ignore_index=ignore_index, **options)  # type: ignore[arg-type]
        return _paired(out, _input, weight, bias, compute_nll_loss)


class LigerFusedLinearCPOFunction:
    """CPO. Returns as `LigerFusedLinearDPOFunction`."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> tuple[Tensor, Auxiliary]:
        """See `linear_dpo_loss` for the errors."""
        out = linear_dpo_loss(
            *(_input, weight, target),
            bias=bias,
            ignore_index=ignore_index,
            beta=beta,
            loss_type="cpo",
            label_smoothing=label_smoothing,
            length_normalize=average_log_prob,
            alpha=alpha if compute_nll_loss else 0.0,
        )
        return _paired(out, _input, weight, bias, compute_nll_loss)


class LigerFusedLinearSimPOFunction:
    """SimPO. Returns as `LigerFusedLinearDPOFunction`; logps and rewards are per token."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> tuple[Tensor, Auxiliary]:
        """See `linear_dpo_loss` for the errors."""
        out = linear_dpo_loss(
            *(_input, weight, target),
            bias=bias,
            ignore_index=ignore_index,
            beta=beta,
            loss_type="simpo",
            label_smoothing=label_smoothing,
            gamma=gamma,
            alpha=alpha if compute_nll_loss else 0.0,
        )
        return _paired(out, _input, weight, bias, compute_nll_loss)


class LigerFusedLinearORPOFunction:
    """ORPO. Returns as `LigerFusedLinearDPOFunction`, per token, and two more: the means over the pairs of
    log sigmoid(log odds ratio) and of the log odds ratio.
    """

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        nll_target: Tensor | None = None,  # [2B, T]: labels of the NLL term, if not target
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> tuple[Tensor, Auxiliary]:
        """See `linear_dpo_loss` for the errors. With nll_target, the chosen half goes through the head twice."""
        own_nll = compute_nll_loss and nll_target is not None
        out = linear_dpo_loss(
            *(_input, weight, target),
            bias=bias,
            ignore_index=ignore_index,
            beta=beta,
            loss_type="orpo",
            alpha=1.0 if compute_nll_loss and not own_nll else 0.0,
        )
        loss, auxiliary = _paired(out, _input, weight, bias, compute_nll_loss)
        if own_nll:
            assert nll_target is not None
            half = target.shape[0] // 2
            labels = nll_target[:half]
            logps = linear_token_logps(_input[:half], weight, labels, bias=bias, ignore_index=ignore_index).logps
            nll = -logps.sum() / (labels != ignore_index).sum().clamp(min=1)
            loss, auxiliary = loss + nll, (*auxiliary[:4], nll.detach(), *auxiliary[5:])
        averages = torch.cat([out.chosen_logps, out.rejected_logps])
        log_odds = log_odds_ratio(Pairs.split(averages, None, torch.ones_like(averages)))
        return loss, (*auxiliary, F.logsigmoid(log_odds).mean(), log_odds.mean())


class LigerFusedLinearKTOFunction:
    """KTO. Returns loss `[]` and the sums over the batch, each `[]` and detached, of (chosen_logps, rejected_logps,
    chosen_logits, rejected_logits, chosen_rewards, rejected_rewards).
    """

    @staticmethod
    def apply(
        _input: Tensor,  # [S, T, H]
        weight: Tensor,
        target: Tensor,  # [S, T]
        preference_labels: Tensor,  # bool [S], True: desirable
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,  # one number
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> tuple[Tensor, Auxiliary]:
        """See `linear_unpaired_loss` for the errors; ValueError also for a kl that is not one number: Liger adds one
        per sequence to every chunk of the batch."""
        if kl is not None and kl.numel() != 1:
            raise ValueError(f"kl: expected one number, [] or [1], got shape {list(kl.shape)}")
        ref = _reference_logps(use_ref_model, ref_input, ref_weight, target, ref_bias, ignore_index)
        out = linear_unpaired_loss(
            *(_input, weight, target, preference_labels, ref),
            bias=bias,
            ignore_index=ignore_index,
            beta=beta,
            loss_type="kto",
            kl=0.0 if kl is None else kl.detach().reshape(()),
            length_normalize=average_log_prob,
        )
        sums = _logit_sums(_input, weight, bias)
        sides = (preference_labels, ~preference_labels)
        return out.loss, tuple(values[side].sum() for values in (out.logps, sums, out.rewards) for side in sides)


liger_fused_linear_dpo = LigerFusedLinearDPOFunction.apply
liger_fused_linear_cpo = LigerFusedLinearCPOFunction.apply
liger_fused_linear_simpo = LigerFusedLinearSimPOFunction.apply
liger_fused_linear_orpo = LigerFusedLinearORPOFunction.apply
liger_fused_linear_kto = LigerFusedLinearKTOFunction.apply


# --- the modules: their fields are Liger's constructor arguments, in Liger's order ------------------------------------


class _Module(nn.Module):
    def __post_init__(self) -> None:
        super().__init__()

    def _options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}


@dataclass(eq=False, repr=False)
class LigerFusedLinearDPOLoss(_Module):
    """`LigerFusedLinearDPOFunction` as a module."""

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    compute_nll_loss: bool = False
    compiled: bool = True
    use_ref_model: bool = True
    average_log_prob: bool = False
    chunk_size: int = 1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        options = cast(LossKeywords, dict(discopop_tau=self.discopop_tau))
        check_keywords(self.beta, self.loss_type, self.label_smoothing, options)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, Auxiliary]:
        """Shapes and values: `LigerFusedLinearDPOFunction`."""
        tensors = (_input, lin_weight, target, bias, ref_input, ref_weight, ref_bias)
        return liger_fused_linear_dpo(*tensors, **self._options())


@dataclass(eq=False, repr=False)
class LigerFusedLinearCPOLoss(_Module):
    """`LigerFusedLinearCPOFunction` as a module."""

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    average_log_prob: bool = False
    chunk_size: int = 1

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Auxiliary]:
        """Shapes and values: `LigerFusedLinearCPOFunction`."""
        return liger_fused_linear_cpo(_input, lin_weight, target, bias, **self._options())


@dataclass(eq=False, repr=False)
class LigerFusedLinearSimPOLoss(_Module):
    """`LigerFusedLinearSimPOFunction` as a module; compute_nll_loss is True here and False there, as in Liger."""

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    gamma: float = 0.5
    chunk_size: int = 1

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Auxiliary]:
        """Shapes and values: `LigerFusedLinearSimPOFunction`."""
        return liger_fused_linear_simpo(_input, lin_weight, target, bias, **self._options())


@dataclass(eq=False, repr=False)
class LigerFusedLinearORPOLoss(_Module):
    """`LigerFusedLinearORPOFunction` as a module."""

    ignore_index: int = -100
    beta: float = 0.1
    compute_nll_loss: bool = True
    compiled: bool = True
    chunk_size: int = 1

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, Auxiliary]:
        """Shapes and values: `LigerFusedLinearORPOFunction`."""
        return liger_fused_linear_orpo(_input, lin_weight, target, bias, nll_target=nll_target, **self._options())


@dataclass(eq=False, repr=False)
class LigerFusedLinearKTOLoss(_Module):
    """`LigerFusedLinearKTOFunction` as a module; use_ref_model is False here and True there, as in Liger."""

    ignore_index: int = -100
    beta: float = 0.1
    compiled: bool = True
    use_ref_model: bool = False
    average_log_prob: bool = False
    chunk_size: int = 1

    def forward(
        self,
        _input: Tensor,  # before the weight, as in Liger
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, Auxiliary]:
        """Shapes and values: `LigerFusedLinearKTOFunction`."""
        if preference_labels is None:
            raise ValueError("preference_labels: expected a bool tensor [S], got None")
        tensors = (_input, lin_weight, target, preference_labels, bias, ref_input, ref_weight, ref_bias, kl)
        return liger_fused_linear_kto(*tensors, **self._options())


# --- shared ----------------------------------------------------------------------------------------------------------


def _reference_logps(
    use_ref_model: bool,
    ref_input: Tensor | None,
    ref_weight: Tensor | None,
    target: Tensor,
    ref_bias: Tensor | None,
    ignore_index: int,
) -> Tensor | None:
    """The reference's token logps, shaped like target, without gradients."""
    if not use_ref_model:
        return None
    if ref_input is None or ref_weight is None:
        missing = "ref_input" if ref_input is None else "ref_weight"
        raise ValueError(f"{missing}: use_ref_model=True needs a tensor, got None")
    with torch.no_grad():
        return linear_token_logps(ref_input, ref_weight, target, bias=ref_bias, ignore_index=ignore_index).logps


def _paired(
    out: PreferenceOutput, _input: Tensor, weight: Tensor, bias: Tensor | None, compute_nll_loss: bool
) -> tuple[Tensor, Auxiliary]:
    chosen, rejected = _logit_sums(_input, weight, bias).chunk(2)
    logits_count = max(1, len(chosen) * _input.shape[1] * weight.shape[0])
    nll = torch.zeros_like(out.loss)
    if compute_nll_loss:
        counted = out.layout.counted.view(out.layout.labels.shape)[: len(chosen)]
        nll = -out.stats.logps.detach()[: len(chosen)].sum() / counted.sum().clamp(min=1)
    means = (chosen.sum() / logits_count, rejected.sum() / logits_count)
    return out.loss, (out.chosen_logps, out.rejected_logps, *means, nll, out.chosen_rewards, out.rejected_rewards)


@torch.no_grad()
def _logit_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The sum of all logits of each sequence `[S]`, ignored positions too, without the logits:

    sum_tv (hidden[s, t] . weight[v] + bias[v]) = (sum_t hidden[s, t]) . (sum_v weight[v]) + T sum_v bias[v]
    """
    sums = hidden.sum(1, dtype=torch.float32) @ weight.sum(0, dtype=torch.float32)
    return sums if bias is None else sums + hidden.shape[1] * bias.sum(dtype=torch.float32)
