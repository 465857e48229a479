"""Losses of each side of a pair on its own: r_w = pairs.chosen_ratio, r_l = pairs.rejected_ratio."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import LossOptions, Pairs


def nca_pair(pairs: Pairs, options: LossOptions) -> Tensor:
    """-log sigmoid(beta r_w) - (log sigmoid(-beta r_w) + log sigmoid(-beta r_l)) / 2"""
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def bco_pair(pairs: Pairs, options: LossOptions) -> Tensor:
    """-log sigmoid(beta r_w) - log sigmoid(-beta r_l)"""
    return bco_side(pairs.chosen_ratio, True, options) + bco_side(pairs.rejected_ratio, False, options)


def sppo_hard(pairs: Pairs, options: LossOptions) -> Tensor:
    """(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2"""
    target = 0.5 / options.beta
    return (pairs.chosen_ratio - target) ** 2 + (pairs.rejected_ratio + target) ** 2


def apo_zero(pairs: Pairs, options: LossOptions) -> Tensor:
    """1 - sigmoid(beta r_w) + sigmoid(beta r_l)"""
    return apo_zero_side(pairs.chosen_ratio, True, options) + apo_zero_side(pairs.rejected_ratio, False, options)


def apo_down(pairs: Pairs, options: LossOptions) -> Tensor:
    """sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l))"""
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def kto(pairs: Pairs, options: LossOptions) -> Tensor:
    """(1 - sigmoid(beta (r_w - kl)) + 1 - sigmoid(beta (kl - r_l))) / 2"""
    return 0.5 * (kto_side(pairs.chosen_ratio, True, options) + kto_side(pairs.rejected_ratio, False, options))


def sft(pairs: Pairs, options: LossOptions) -> Tensor:
    """-log p(y_w|x), the mean over all chosen tokens of the batch"""
    return nll(pairs)


def nll(pairs: Pairs) -> Tensor:
    """The NLL term of RPO, ORPO and CPO, `[B]`: its mean over the pairs is -log p of the chosen completions per token,
    a mean over all their tokens."""
    return pairs.chosen_nll * (len(pairs.chosen_nll) / pairs.chosen_length.sum().clamp(min=1))


# --- one side: completions that are desirable (chosen) or not; ratio [S], desirable one bool or [S] -------------------


def kto_side(ratio: Tensor, desirable: bool | Tensor, options: LossOptions) -> Tensor:
    """1 - sigmoid(beta (r - kl)) if desirable, else 1 - sigmoid(beta (kl - r))"""
    return torch.sigmoid(-_gain(options.beta * (ratio - options.kl), desirable))


def bco_side(ratio: Tensor, desirable: bool | Tensor, options: LossOptions) -> Tensor:
    """-log sigmoid(beta r) if desirable, else -log sigmoid(-beta r)"""
    return -F.logsigmoid(_gain(options.beta * ratio, desirable))


def apo_zero_side(ratio: Tensor, desirable: bool | Tensor, options: LossOptions) -> Tensor:
    """1 - sigmoid(beta r) if desirable, else sigmoid(beta r)"""
    return torch.sigmoid(-_gain(options.beta * ratio, desirable))


def _gain(reward: Tensor, desirable: bool | Tensor) -> Tensor:
    if isinstance(desirable, Tensor):
        return torch.where(desirable, reward, -reward)
    return reward if desirable else -reward
