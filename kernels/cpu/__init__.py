"""C++ backend (AVX2, AVX-512; float32, bf16, fp16): the functions of fastdpo/eager.py, specification included."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastdpo.options import Transform

from .build import BuildError, library

# What the C++ returns beside logps and lse, in its order
_STATS = ("entropy", "mean_logits", "log_sum_sq_probs", "is_top1")


@functools.cache
def unavailable() -> str | None:
    """None once the library is built and loaded; else the reason."""
    try:
        torch.ops.load_library(library())
    except (BuildError, OSError) as error:
        return str(error)
    return None


def row_forward(logits: Tensor, targets: Tensor, transform: Transform, stats: tuple[str, ...]) -> list[Tensor]:
    logps, lse, *rest = torch.ops.fastdpo_cpu.row_forward(logits, targets, *transform, bool(stats))
    by_name = dict(zip(_STATS, rest, strict=False))
    return [logps, lse, *(by_name[name] for name in stats)]


def row_backward(
    logits: Tensor,
    targets: Tensor,
    logps: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    transform: Transform,
    vocab_start: int,
    out: Tensor,
) -> None:
    torch.ops.fastdpo_cpu.row_backward(
        logits, targets, logps, lse, entropy, grad_logps, grad_entropy, *transform, vocab_start, out
    )


def sequence_sums(values: Tensor, bounds: Tensor) -> Tensor:
    return torch.ops.fastdpo_cpu.sequence_sums(values, bounds)


def pair_sigmoid(
    logps: Tensor, bounds: Tensor, ref_logps: Tensor | None, beta: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.fastdpo_cpu.pair_sigmoid(logps, bounds, ref_logps, beta, label_smoothing)
