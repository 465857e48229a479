"""Heads to test on."""

from __future__ import annotations

import torch
from torch import Tensor


def peaked(tokens: int, vocab: int = 3001, hidden: int = 32, sharp: float = 1.5, seed: int = 0) -> tuple[Tensor, ...]:
    """A head whose softmax lives on few columns, as a trained model's: hidden, weight, labels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, hidden, generator=generator)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    noise = torch.randn(tokens, hidden, generator=generator)
    return sharp * (weight[labels % 97] + 0.3 * noise), weight, labels
