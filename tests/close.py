"""One rule of tolerance: at most a small multiple of the error that plain PyTorch makes in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(result: Tensor, truth: Tensor, yardstick: Tensor, factor: float = 3, unit: float = 0) -> None:
    """result against truth (float64); yardstick: plain PyTorch's result in result's dtype.

    A yardstick may happen to be exact: 2e-6 (16 roundings of a float32) of the largest magnitude of truth, or of
    `unit` where truth is a small difference of numbers of that size, is allowed too.
    """
    assert result.shape == truth.shape
    truth = truth.double()
    assert torch.isfinite(truth).all(), "the truth itself is not finite"
    error = (result.double() - truth).abs().max().item() if truth.numel() else 0.0
    allowed = (yardstick.double() - truth).abs().max().item() if truth.numel() else 0.0
    scale = max(unit, truth.abs().max().item()) if truth.numel() else 0.0
    assert error <= factor * allowed + 2e-6 * scale, (
        f"error {error:.3g}, plain PyTorch's {allowed:.3g}, scale {scale:.3g}"
    )
