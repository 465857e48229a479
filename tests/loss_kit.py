"""One pair whose losses can be worked by hand."""

from __future__ import annotations

from typing import Any

import torch
from every_loss import referenced
from torch import Tensor

from fastdpo import dpo_loss
from fastdpo.losses import LOSSES

F64 = torch.float64


def one_pair() -> tuple[Tensor, Tensor, Tensor]:
    """Logits over a vocabulary of 2, labels, reference logps.

    Probability of the label at each position: chosen 0.8, 0.5; rejected 0.25, then an ignored position. So the
    sequence logps are ln 0.4 (2 tokens) and ln 0.25 (1 token). Reference ln 0.2 and ln 0.5: the ratios are
    r_w = ln 2 and r_l = -ln 2, and h = ln 4.
    """
    p = torch.tensor([[0.8, 0.5], [0.25, 0.9]], dtype=F64)
    labels = torch.tensor([[1, 1], [1, -100]])
    return torch.stack([(1 - p).log(), p.log()], dim=-1), labels, torch.tensor([0.2, 0.5], dtype=F64).log()


def loss_of(loss_type: Any, **options: Any) -> float:
    logits, labels, ref = one_pair()
    takes_ref = not isinstance(loss_type, str) or loss_type not in LOSSES or referenced(loss_type)
    return dpo_loss(logits, labels, ref if takes_ref else None, loss_type=loss_type, **options).loss.item()
