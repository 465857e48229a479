"""The preference losses as modules: keywords at construction, checked there, and tensors at the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from .losses.keywords import PER_BATCH, LossKeywords, check_keywords, check_known, is_schedule
from .losses.pairs import LossOptions
from .names import check_names
from .options import head_options
from .parallel import SequenceParallel, check_parallel
from .preference import PreferenceOutput, dpo_loss, linear_dpo_loss


class _LossModule(nn.Module):
    """Keywords of a loss function, for every call."""

    def __init__(self, function: Callable[..., PreferenceOutput], keywords: dict[str, Any]) -> None:
        super().__init__()
        check_construction(function, keywords)
        self.keywords = keywords

    def at_call(self, per_batch: dict[str, Any]) -> dict[str, Any]:
        """The keywords, with those that came with the batch."""
        check_names("the call", per_batch, PER_BATCH)
        return self.keywords | per_batch

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.keywords.items())


class DPOLoss(_LossModule):
    """`dpo_loss` as a module: the keywords at construction, the tensors at the call."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(dpo_loss, keywords)

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        ref_logps: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        **per_batch: Any,
    ) -> PreferenceOutput:
        """See `dpo_loss`. per_batch: beta, gamma, kl, token_weights, pair_weights and step may come with the batch."""
        return dpo_loss(logits, labels, ref_logps, cu_seqlens=cu_seqlens, **self.at_call(per_batch))


class LinearDPOLoss(_LossModule):
    """`linear_dpo_loss` as a module. The LM head's weight and bias stay the model's: pass them at the call."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(linear_dpo_loss, keywords)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ref_logps: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **per_batch: Any,
    ) -> PreferenceOutput:
        """See `linear_dpo_loss`, and `DPOLoss.forward` for per_batch."""
        keywords = self.at_call(per_batch)
        return linear_dpo_loss(hidden, weight, labels, ref_logps, bias=bias, cu_seqlens=cu_seqlens, **keywords)


def check_construction(function: Callable[..., PreferenceOutput], keywords: dict[str, Any]) -> None:
    """Raise at construction for what would raise at the call: unknown keywords and bad values."""
    for name in ("bias", "cu_seqlens"):
        if name in keywords:
            raise TypeError(f"{name}: comes with the batch, expected at the call and not at construction")
    values = dict(function.__kwdefaults__ or {})
    options = {name: value for name, value in keywords.items() if name not in values}
    check_known(function, options)
    values |= {name: value for name, value in keywords.items() if name in values}
    beta, loss_type, label_smoothing = (values.pop(name) for name in ("beta", "loss_type", "label_smoothing"))
    if is_schedule(beta):  # its values: with the steps
        beta = LossOptions().beta
    check_keywords(beta, loss_type, label_smoothing, cast(LossKeywords, options))
    check_parallel("sequence_parallel", values.pop("sequence_parallel"), SequenceParallel)
    head_options(**{name: value for name, value in values.items() if name not in ("bias", "cu_seqlens")})
