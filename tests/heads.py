"""Heads to test on, and what a backend cannot be tested in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdpo.backend import BACKENDS


def peaked(tokens: int, vocab: int = 3001, hidden: int = 32, sharp: float = 1.5, seed: int = 0) -> tuple[Tensor, ...]:
    """A head whose softmax lives on few columns, as a trained model's: hidden, weight, labels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, hidden, generator=generator)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    noise = torch.randn(tokens, hidden, generator=generator)
    return sharp * (weight[labels % 97] + 0.3 * noise), weight, labels


def skip_unfit(backend: str, dtype: torch.dtype) -> None:
    """Skip a test in a dtype that the backend does not take on a CPU."""
    if reason := BACKENDS[backend].unfit(torch.device("cpu"), dtype):
        pytest.skip(f"{backend}: {reason}")
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bf16; compiled kernels are checked in test_gpu_static.py")
