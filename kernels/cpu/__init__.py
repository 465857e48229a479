"""C++ backend (AVX2, AVX-512; float32, bf16, fp16): the functions of fastdpo/eager.py, specification included."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastdpo import eager
from fastdpo.compaction import Compact
from fastdpo.eager import column_mass, column_probs
from fastdpo.options import Transform

from .build import BuildError, library

__all__ = [
    "add_weight_gradient",
    "column_mass",
    "column_probs",
    "compact_gradient",
    "pair_sigmoid",
    "row_backward",
    "row_forward",
    "sequence_sums",
    "stream_gradient",
    "stream_tile",
    "streams",
    "unavailable",
]

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
    return _ordered(torch.ops.fastdpo_cpu.row_forward(logits, targets, *transform, bool(stats)), stats)


def _ordered(results: list[Tensor], stats: tuple[str, ...]) -> list[Tensor]:
    logps, lse, *rest = results
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


@functools.cache
def streams() -> bool:
    """Whether `stream_tile` runs on this CPU: it needs bf16 products (AVX512-BF16 or AMX)."""
    return torch.ops.fastdpo_cpu.streams()


def stream_tile(
    hidden: Tensor,  # bf16 [n, H], H even
    weight: Tensor,  # bf16 or float32 [V, H], dense rows
    bias: Tensor | None,  # [V]
    targets: Tensor,  # int64 [n], all in [0, V)
    transform: Transform,
    stats: tuple[str, ...],
    grad_tol: float,
    workspace_mb: float,
) -> tuple[list[Tensor], Compact | None]:
    """row_forward's results straight from hidden states (float32 logits, never as a whole); and the kept columns.

    None in their place where grad_tol is 0 or the softmax is not sparse enough (or the workspace too small to see it).
    """
    bias = None if bias is None else bias.float().contiguous()
    out = torch.ops.fastdpo_cpu.stream_forward(
        hidden.contiguous(), weight, bias, targets, *transform, bool(stats), grad_tol, workspace_mb
    )
    *results, columns, probs, dropped, mean_row = out
    compact = Compact(columns, probs, dropped, mean_row) if len(columns) else None
    return _ordered(results, stats), compact


def stream_gradient(
    hidden: Tensor,  # bf16 [n, H], H even
    weight: Tensor,  # bf16 or float32 [V, H], dense rows
    bias: Tensor | None,  # [V]
    targets: Tensor,  # int64 [n], all in [0, V)
    logps: Tensor,  # [n], and so are the next four
    lse: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    transform: Transform,
    first: int,
    last: int,
) -> Tensor:
    """row_backward's gradient of columns first .. last-1 from hidden states, transposed: bf16 `[last-first, n]`."""
    bias = None if bias is None else bias.float().contiguous()
    rows = (targets, logps, lse, entropy, grad_logps, grad_entropy)
    return torch.ops.fastdpo_cpu.stream_gradient(hidden.contiguous(), weight, bias, *rows, *transform, first, last)


def compact_gradient(
    probs: Tensor,
    columns: Tensor,
    targets: Tensor,
    logps: Tensor,
    lse: Tensor,
    grad_logps: Tensor,
    transform: Transform,
) -> Tensor:
    return torch.ops.fastdpo_cpu.compact_gradient(
        probs.contiguous(), columns, targets, logps, lse, grad_logps, *transform
    )


def add_weight_gradient(total: Tensor, slots: Tensor, grad: Tensor, hidden: Tensor) -> None:
    if grad.dtype != torch.bfloat16 or not streams():
        eager.add_weight_gradient(total, slots, grad, hidden)
        return
    if grad.shape[1] % 2:  # the product takes tokens in pairs
        grad, hidden = torch.nn.functional.pad(grad, (0, 1)), torch.nn.functional.pad(hidden, (0, 0, 0, 1))
    torch.ops.fastdpo_cpu.weight_gradient(total, slots, grad, hidden.contiguous())


def sequence_sums(values: Tensor, bounds: Tensor) -> Tensor:
    return torch.ops.fastdpo_cpu.sequence_sums(values, bounds)


def pair_sigmoid(
    logps: Tensor, bounds: Tensor, ref_logps: Tensor | None, beta: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.fastdpo_cpu.pair_sigmoid(logps, bounds, ref_logps, beta, label_smoothing)
