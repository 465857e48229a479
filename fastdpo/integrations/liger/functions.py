"""Liger's autograd Functions, of which only `apply` is public, and what they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...head import linear_token_logps
from ...inputs import check_flag, check_tensor
from ...losses import Pairs
from ...losses.keywords import LossKeywords, check_keywords, find_losses
from ...losses.margin import log_odds_ratio
from ...preference import PreferenceOutput, linear_dpo_loss
from ...unpaired import linear_unpaired_loss

# What Liger's own DPO knows: those have its averaging and its NLL term, other losses their own
DPO_LOSSES = (
    *("sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
    "discopop",
)
SUM_ROWS = 4096  # of the head at once, for the mean of all logits


class PairAuxiliary(NamedTuple):
    """What a pair loss returns beside the loss; all detached. Logps and rewards are averages where the loss's are."""

    chosen_logps: Tensor  # [B]
    rejected_logps: Tensor  # [B]
    chosen_logits_mean: Tensor  # [], over the vocabulary and all positions, ignored ones too
    rejected_logits_mean: Tensor  # []
    nll_loss: Tensor  # [], of the chosen completions; 0 without compute_nll_loss
    chosen_rewards: Tensor  # [B]
    rejected_rewards: Tensor  # [B]


class LigerFusedLinearDPOFunction:
    """DPO's losses. Returns loss `[]` and `PairAuxiliary`."""

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
    ) -> tuple[Tensor, PairAuxiliary]:
        """See `linear_dpo_loss` for the errors; ValueError also for use_ref_model without ref_input or with a loss that
        has no reference."""
        options = dict(
            beta=beta,
            compute_nll_loss=compute_nll_loss,
            use_ref_model=use_ref_model,
            average_log_prob=average_log_prob,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            discopop_tau=discopop_tau,
            alpha=alpha,
        )
        reference = (ref_input, ref_weight, ref_bias)
        return _pair_loss(_input, weight, target, bias, ignore_index, options, reference)[1:]


class LigerFusedLinearCPOFunction:
    """CPO. Returns loss `[]` and `PairAuxiliary`."""

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
    ) -> tuple[Tensor, PairAuxiliary]:
        """See `linear_dpo_loss` for the errors."""
        options = dict(
            loss_type="cpo",
            beta=beta,
            alpha=alpha,
            label_smoothing=label_smoothing,
            compute_nll_loss=compute_nll_loss,
            average_log_prob=average_log_prob,
        )
        return _pair_loss(_input, weight, target, bias, ignore_index, options)[1:]


class LigerFusedLinearSimPOFunction:
    """SimPO. Returns loss `[]` and `PairAuxiliary`; logps and rewards are per token."""

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
    ) -> tuple[Tensor, PairAuxiliary]:
        """See `linear_dpo_loss` for the errors."""
        options = dict(
            loss_type="simpo",
            beta=beta,
            alpha=alpha,
            label_smoothing=label_smoothing,
            compute_nll_loss=compute_nll_loss,
            gamma=gamma,
        )
        return _pair_loss(_input, weight, target, bias, ignore_index, options)[1:]


class LigerFusedLinearORPOFunction:
    """ORPO. Returns loss `[]` and `PairAuxiliary`'s values, per token, and two more: the means over the pairs of
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
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `linear_dpo_loss` for the errors. With nll_target, the chosen half goes through the head twice."""
        options = dict(loss_type="orpo", beta=beta, compute_nll_loss=compute_nll_loss)
        own_nll = compute_nll_loss and nll_target is not None
        if own_nll:
            options["compute_nll_loss"] = False
        out, loss, auxiliary = _pair_loss(_input, weight, target, bias, ignore_index, options)
        if own_nll:
            check_tensor("nll_target", nll_target, floats=False)
            labels = cast(Tensor, nll_target)
            if labels.shape != target.shape:
                raise ValueError(
                    f"nll_target: expected the shape of target, {list(target.shape)}, got {list(labels.shape)}"
                )
            labels = labels.chunk(2)[0]
            hidden = _input[: len(labels)]
            logps = linear_token_logps(hidden, weight, labels, bias=bias, ignore_index=ignore_index).logps
            nll = -logps.sum() / (labels != ignore_index).sum().clamp(min=1)
            loss, auxiliary = loss + nll, auxiliary._replace(nll_loss=nll.detach())
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
        kl: Tensor | float | None = None,  # one number, or one per sequence, [S]; a constant
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `linear_unpaired_loss` for the errors; ValueError also for use_ref_model without ref_input."""
        _check_batch(_input, target)
        check_tensor("preference_labels", preference_labels, floats=False)
        if preference_labels.dtype != torch.bool or preference_labels.shape != target.shape[:1]:
            raise ValueError(
                f"preference_labels: expected a bool tensor [{len(target)}], got {preference_labels.dtype} "
                f"{list(preference_labels.shape)}"
            )
        if isinstance(kl, Tensor):
            kl = kl.detach().reshape(()) if kl.numel() == 1 else kl.detach()
        ref = _reference_logps(use_ref_model, (ref_input, ref_weight, ref_bias), target, ignore_index)
        options = loss_keywords(dict(loss_type="kto", beta=beta, average_log_prob=average_log_prob))
        out = linear_unpaired_loss(
            *(_input, weight, target, preference_labels, ref),
            bias=bias,
            ignore_index=ignore_index,
            kl=0.0 if kl is None else kl,
            **options,
        )
        sums = _logit_sums(_input, weight, bias)
        sides = (preference_labels, ~preference_labels)
        return out.loss, tuple(values[side].sum() for values in (out.logps, sums, out.rewards) for side in sides)


liger_fused_linear_dpo = LigerFusedLinearDPOFunction.apply
liger_fused_linear_cpo = LigerFusedLinearCPOFunction.apply
liger_fused_linear_simpo = LigerFusedLinearSimPOFunction.apply
liger_fused_linear_orpo = LigerFusedLinearORPOFunction.apply
liger_fused_linear_kto = LigerFusedLinearKTOFunction.apply


# --- shared ----------------------------------------------------------------------------------------------------------


def loss_keywords(options: Mapping[str, Any]) -> dict[str, Any]:
    """Liger's options of a loss as keywords of `linear_dpo_loss` (for kto, of `linear_unpaired_loss`), checked.

    Raises:
        TypeError, ValueError: as `linear_dpo_loss`; use_ref_model with a loss that has no reference.
    """
    for name in ("compute_nll_loss", "use_ref_model", "average_log_prob"):
        if name in options:
            check_flag(name, options[name])
    loss_type = options["loss_type"]
    names = ("beta", "loss_type", "label_smoothing", "discopop_tau", "gamma")
    keywords = {name: options[name] for name in names if name in options}
    # Where Liger's DPO does not know the loss, False means the loss's own and not the opposite of it
    off = "use_ref_model" in options and loss_type not in (*DPO_LOSSES, "kto")
    if "average_log_prob" in options:
        average = options["average_log_prob"]
        keywords["length_normalize"] = None if off and not average else average
    if "compute_nll_loss" in options:
        without = None if off else 0.0
        keywords["alpha"] = options.get("alpha", 1.0) if options["compute_nll_loss"] else without
    own = {name: value for name, value in keywords.items() if name not in ("beta", "loss_type", "label_smoothing")}
    check_keywords(keywords["beta"], loss_type, keywords.get("label_smoothing", 0.0), cast(LossKeywords, own))
    if options.get("use_ref_model") and not any("ref_logps" in row.uses for row in find_losses(loss_type)):
        raise ValueError(f"use_ref_model: loss {loss_type!r} has no reference, expected False, got True")
    return keywords


Reference = tuple["Tensor | None", "Tensor | None", "Tensor | None"]  # ref_input, ref_weight, ref_bias


def _pair_loss(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    options: Mapping[str, Any],
    reference: Reference = (None, None, None),
) -> tuple[PreferenceOutput, Tensor, PairAuxiliary]:
    """What `linear_dpo_loss` returns, the loss, and Liger's auxiliary outputs."""
    keywords = loss_keywords(options)
    _check_batch(_input, target)
    if len(target) % 2:
        raise ValueError(f"target: expected [2B, T], chosen then rejected, got shape {list(target.shape)}")
    ref = _reference_logps(options.get("use_ref_model", False), reference, target, ignore_index)
    out = linear_dpo_loss(_input, weight, target, ref, bias=bias, ignore_index=ignore_index, **keywords)
    chosen, rejected = _logit_sums(_input, weight, bias).chunk(2)
    logits_count = max(1, len(chosen) * _input.shape[1] * weight.shape[0])
    nll = torch.zeros_like(out.loss)
    if options["compute_nll_loss"]:
        counted = out.layout.counted.view(out.layout.labels.shape)[: len(chosen)]
        nll = -out.stats.logps.detach()[: len(chosen)].sum() / counted.sum().clamp(min=1)
    means = (chosen.sum() / logits_count, rejected.sum() / logits_count)
    sides = (out.chosen_logps, out.rejected_logps, *means, nll, out.chosen_rewards, out.rejected_rewards)
    return out, out.loss, PairAuxiliary(*sides)


def _check_batch(_input: Tensor, target: Tensor) -> None:
    check_tensor("_input", _input)
    check_tensor("target", target, floats=False)
    if _input.dim() != 3:
        raise ValueError(f"_input: expected [2B, T, H], got shape {list(_input.shape)}")
    if target.shape != _input.shape[:2]:
        raise ValueError(
            f"target: expected the shape of _input without H, {list(_input.shape[:2])}, got {list(target.shape)}"
        )


def _reference_logps(use_ref_model: bool, reference: Reference, target: Tensor, ignore_index: int) -> Tensor | None:
    """The reference's token logps, shaped like target, without gradients."""
    check_flag("use_ref_model", use_ref_model)
    if not use_ref_model:
        return None
    ref_input, ref_weight, ref_bias = reference
    if ref_input is None or ref_weight is None:
        missing = "ref_input" if ref_input is None else "ref_weight"
        raise ValueError(f"{missing}: use_ref_model=True needs a tensor, got None")
    with torch.no_grad():
        return linear_token_logps(ref_input, ref_weight, target, bias=ref_bias, ignore_index=ignore_index).logps


@torch.no_grad()
def _logit_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The sum of all logits of each sequence, float32 `[S]`, ignored positions too, without the logits:

    sum_tv (hidden[s, t] . weight[v] + bias[v]) = (sum_t hidden[s, t]) . (sum_v weight[v]) + T sum_v bias[v]
    """
    with torch.autocast(hidden.device.type, enabled=False):
        # In blocks: on a CPU, a sum with another dtype first copies all that it sums
        columns = sum(block.sum(0, dtype=torch.float32) for block in weight.split(SUM_ROWS))
        sums = torch.stack([sequence.sum(0, dtype=torch.float32) for sequence in hidden]) @ columns
        return sums if bias is None else sums + hidden.shape[1] * bias.sum(dtype=torch.float32)
