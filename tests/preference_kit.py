"""Batches of the tests of dpo_loss."""

from __future__ import annotations

import torch
from torch import Tensor


def pair_logits() -> tuple[Tensor, Tensor]:
    """One pair over a vocabulary of 2. Probability of token 1 at each position: chosen 0.8, 0.5; rejected 0.25, 0.9.

    Labels are token 1 everywhere but the last rejected position, which is ignored. Sequence logps:
    chosen ln 0.8 + ln 0.5 = ln 0.4; rejected ln 0.25.
    """
    p = torch.tensor([[0.8, 0.5], [0.25, 0.9]], dtype=torch.float64)
    return torch.stack([(1 - p).log(), p.log()], dim=-1), torch.tensor([[1, 1], [1, -100]])


def batch(pairs: int = 2, length: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(2 * pairs, length, 16)
    weight = torch.randn(301, 16)
    labels = torch.randint(0, 301, (2 * pairs, length))
    labels[0, :3] = -100
    labels[-1] = -100  # a fully masked sequence
    return hidden, weight, labels, -20 * torch.rand(2 * pairs)


def plain(logits: Tensor, labels: Tensor, ref: Tensor | None, beta: float) -> Tensor:
    """The loss by plain autograd, written apart from the package."""
    counted = labels != -100
    logps = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    sums = (logps * counted).sum(-1) - (0 if ref is None else ref)
    chosen, rejected = sums.chunk(2)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()
