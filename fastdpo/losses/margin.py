"""Losses of the margin between the two sides of a pair.

h = pairs.margin; z = beta h - gamma, the reward margin less the margin asked for; eps = label_smoothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import LossOptions, Pairs


def sigmoid(pairs: Pairs, options: LossOptions) -> Tensor:
    """-(1-eps) log sigmoid(z) - eps log sigmoid(-z)"""
    return _smoothed(_z(pairs.margin, options), options)


def hinge(pairs: Pairs, options: LossOptions) -> Tensor:
    """max(0, 1 - z)"""
    return F.relu(1 - _z(pairs.margin, options))


def ipo(pairs: Pairs, options: LossOptions) -> Tensor:
    """(h - 1/(2 beta))^2"""
    # Scores of an f-divergence may be so large that their square leaves the dtype
    largest = torch.finfo(pairs.margin.dtype).max ** 0.5 / 1e3
    return (pairs.margin.clamp(-largest, largest) - 1 / (2 * options.beta)) ** 2


def exo_pair(pairs: Pairs, options: LossOptions) -> Tensor:
    """KL(q || p) with q = (sigmoid(z), sigmoid(-z)), p = (1-eps, eps)"""
    z = _z(pairs.margin, options)
    chosen = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-options.label_smoothing))
    return chosen + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(options.label_smoothing))


def robust(pairs: Pairs, options: LossOptions) -> Tensor:
    """(-(1-eps) log sigmoid(z) + eps log sigmoid(-z)) / (1 - 2 eps)"""
    z, eps = _z(pairs.margin, options), options.label_smoothing
    return (eps * F.logsigmoid(-z) - (1 - eps) * F.logsigmoid(z)) / (1 - 2 * eps)


def discopop(pairs: Pairs, options: LossOptions) -> Tensor:
    """-(1-m) log sigmoid(z) + m exp(-z), m = sigmoid(z / tau)"""
    z = _z(pairs.margin, options)
    scaled = z / options.discopop_tau
    # m exp(-z) as one exponential: exp(-z) alone overflows where m is 0
    return torch.exp(F.logsigmoid(scaled) - z) - torch.sigmoid(-scaled) * F.logsigmoid(z)


def aot(pairs: Pairs, options: LossOptions) -> Tensor:
    """sigmoid's of z = beta (sort(log p_w/p_l) - sort(log ref_w/ref_l)) - gamma, sorted over the batch"""
    policy = (pairs.chosen - pairs.rejected).sort().values
    reference = (pairs.ref_chosen - pairs.ref_rejected).sort().values
    return _smoothed(_z(policy - reference, options), options)


def aot_unpaired(pairs: Pairs, options: LossOptions) -> Tensor:
    """sigmoid's of z = beta (sort(r_w) - sort(r_l)) - gamma, sorted over the batch"""
    ordered = pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values
    return _smoothed(_z(ordered, options), options)


def orpo(pairs: Pairs, options: LossOptions) -> Tensor:
    """-beta log sigmoid(log odds(y_w) - log odds(y_l)), odds = p / (1 - p), p = exp(mean token logp)"""
    return -options.beta * F.logsigmoid(log_odds_ratio(pairs))


def log_odds_ratio(pairs: Pairs) -> Tensor:
    """log odds(y_w|x) - log odds(y_l|x), each side's p from its (averaged) logp"""
    return _log_odds(pairs.chosen) - _log_odds(pairs.rejected)


def _log_odds(logp: Tensor) -> Tensor:
    # An empty completion has logp 0 and so p = 1, whose odds are infinite: the last p below 1 stands for it
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


def _z(h: Tensor, options: LossOptions) -> Tensor:
    return options.beta * h if options.gamma is None else options.beta * h - options.gamma


def _smoothed(z: Tensor, options: LossOptions) -> Tensor:
    loss = -(1 - options.label_smoothing) * F.logsigmoid(z)
    if options.label_smoothing:
        loss = loss - options.label_smoothing * F.logsigmoid(-z)
    return loss
