"""LOSSES: name -> pure function of sequence logps, with its equation and paper.

The head knows log-probabilities only; a loss knows sequences only. To add one: a function and a row of the table.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .options import check_number


class LossOptions(NamedTuple):
    beta: float = 0.1
    label_smoothing: float = 0.0


class Pairs(NamedTuple):
    """Sequence logps of B pairs; each `[B]`. Without a reference its logps are 0 (the reference-free losses)."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_length: Tensor  # tokens that count
    rejected_length: Tensor

    @classmethod
    def split(cls, logps: Tensor, ref_logps: Tensor | None, lengths: Tensor) -> Pairs:
        """logps, ref_logps, lengths `[2B]`: rows 0..B-1 chosen, B..2B-1 rejected."""
        half = logps.shape[0] // 2
        ref = logps.new_zeros(logps.shape) if ref_logps is None else ref_logps
        return cls(logps[:half], logps[half:], ref[:half], ref[half:], lengths[:half], lengths[half:])

    @property
    def chosen_ratio(self) -> Tensor:
        """log p(y_w|x) - log p_ref(y_w|x)"""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """log p(y_l|x) - log p_ref(y_l|x)"""
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """h = chosen_ratio - rejected_ratio"""
        return self.chosen_ratio - self.rejected_ratio


def sigmoid(pairs: Pairs, options: LossOptions) -> Tensor:  # arXiv 2305.18290, eq. 7; smoothing: cDPO
    """-(1-eps) log sigmoid(beta h) - eps log sigmoid(-beta h)"""
    reward_margin = options.beta * pairs.margin
    loss = -(1 - options.label_smoothing) * F.logsigmoid(reward_margin)
    if options.label_smoothing:
        loss = loss - options.label_smoothing * F.logsigmoid(-reward_margin)
    return loss


def hinge(pairs: Pairs, options: LossOptions) -> Tensor:  # SLiC, arXiv 2305.10425, on DPO's rewards
    """max(0, 1 - beta h)"""
    _no_smoothing("hinge", options)
    return F.relu(1 - options.beta * pairs.margin)


def ipo(pairs: Pairs, options: LossOptions) -> Tensor:  # arXiv 2310.12036, eq. 17; per token, as its authors and TRL
    """(chosen_ratio/|y_w| - rejected_ratio/|y_l| - 1/(2 beta))^2"""
    _no_smoothing("ipo", options)
    chosen = pairs.chosen_ratio / pairs.chosen_length.clamp(min=1)
    rejected = pairs.rejected_ratio / pairs.rejected_length.clamp(min=1)
    return (chosen - rejected - 1 / (2 * options.beta)) ** 2


Loss = Callable[[Pairs, LossOptions], Tensor]  # -> [B]
LOSSES: dict[str, Loss] = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo}


def check_loss(loss_type: str, options: LossOptions) -> None:
    """Raise ValueError for an unknown loss or an option outside its range."""
    if not isinstance(loss_type, str) or loss_type not in LOSSES:
        near = difflib.get_close_matches(str(loss_type), LOSSES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"loss_type: unknown loss {loss_type!r}, expected one of {', '.join(LOSSES)}{hint}")
    check_number("beta", options.beta, above=0)
    check_number("label_smoothing", options.label_smoothing)
    if not 0 <= options.label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: expected a number in [0, 0.5), got {options.label_smoothing!r}")


def _no_smoothing(name: str, options: LossOptions) -> None:
    if options.label_smoothing:
        raise ValueError(
            f"label_smoothing: loss {name!r} does not use it (sigmoid does), got {options.label_smoothing!r}"
        )
