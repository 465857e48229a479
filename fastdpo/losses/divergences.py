"""f-DPO (arXiv 2309.16240): under an f-divergence the log-ratio r = log p/p_ref becomes the score f'(p/p_ref)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Callable[..., Tensor]  # (log-ratio, alpha_divergence's alpha) -> score

# Beyond it exp() leaves the dtype; the score stays there, as TRL's of alpha_divergence
_LARGEST_EXPONENT = {torch.float32: 80.0, torch.float64: 700.0}


def reverse_kl(ratio: Tensor, alpha: float) -> Tensor:
    """r"""
    return ratio


def forward_kl(ratio: Tensor, alpha: float) -> Tensor:
    """1 - exp(-r)"""
    return -torch.expm1(_bounded(-ratio))


def js_divergence(ratio: Tensor, alpha: float) -> Tensor:
    """log 2 + log sigmoid(r)"""
    return math.log(2) + F.logsigmoid(ratio)


def alpha_divergence(ratio: Tensor, alpha: float) -> Tensor:
    """(exp((alpha - 1) r) - 1) / (alpha - 1); its limit r at alpha = 1"""
    if abs(alpha - 1) < 1e-6:
        return ratio
    return torch.expm1(_bounded((alpha - 1) * ratio)) / (alpha - 1)


def _bounded(exponent: Tensor) -> Tensor:
    return exponent.clamp(max=_LARGEST_EXPONENT[exponent.dtype])


F_DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}
