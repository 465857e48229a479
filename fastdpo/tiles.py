"""The tile loop of the from-hidden path: library products, row kernels, never `[N, V]`.

Forward: tiles of tokens. A tile's logits `[n, V]` live in one reused buffer of at most `workspace_mb`.
Backward: tiles of vocabulary columns over all tokens, with the lse of the forward. A tile `[N, w]` owns w whole rows
of dW, so dW is summed inside one product (float32) and rounded once, with no float32 `[V, H]` buffer. If all logits
fitted the workspace, the forward's tile was kept, and nothing is computed twice (6*N*V*H operations instead of 8).

Compaction of the vocabulary (design: keep the columns that hold the probability) will take the place of `backward`
for `grad_tol > 0`.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .options import Transform

# Where weight is not in the dtype of the product (autocast), this many bytes of it are cast at a time
_CAST_BYTES = 32 << 20


class Head(NamedTuple):
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    transform: Transform
    dtype: torch.dtype  # of the products
    workspace_mb: float
    kernels: ModuleType

    def columns(self, start: int, stop: int) -> Tensor:
        """weight[start:stop] in the dtype of the products."""
        return self.weight[start:stop].to(self.dtype)

    def logits(self, hidden: Tensor, start: int, stop: int, out: Tensor) -> None:
        """out[:, start:stop of the vocabulary] = hidden @ weight.T + bias; out `[n, stop-start]`"""
        step = stop - start
        if self.weight.dtype != self.dtype:
            step = max(1, _CAST_BYTES // (self.weight.shape[1] * self.dtype.itemsize))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            block = out[:, first - start : last - start]
            torch.mm(hidden, self.columns(first, last).t(), out=block)
            if self.bias is not None:
                block += self.bias[first:last].to(self.dtype)


class RowGrads(NamedTuple):
    """What the forward left and what autograd brings, each `[N]`."""

    targets: Tensor  # int64
    logps: Tensor
    lse: Tensor
    entropy: Tensor | None
    grad_logps: Tensor | None
    grad_entropy: Tensor | None

    def select(self, rows: Tensor | None) -> RowGrads:
        return self if rows is None else RowGrads(*(None if x is None else x[rows] for x in self))


def kept_tile_shape(
    targets: Tensor, weight: Tensor, dtype: torch.dtype, workspace_mb: float, keep: bool
) -> tuple[int, int]:
    """The tile that the forward keeps for the backward: all logits or nothing. From sizes alone, for torch.compile."""
    tokens, vocab = targets.shape[0], weight.shape[0]
    fits = tokens * vocab * dtype.itemsize <= workspace_mb * 2**20
    return (tokens, vocab) if keep and fits else (0, vocab)


def _counted(targets: Tensor) -> Tensor | None:
    """Indices of the rows that count; None where all do. One host synchronisation on a GPU."""
    rows = (targets >= 0).nonzero().squeeze(1)
    return None if len(rows) == len(targets) else rows


def _select(tensor: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (tensor if rows is None else tensor[rows]).to(dtype)


def _tile(head: Head, wide: int, limit: int) -> int:
    """How many rows (or columns) of `wide` logits the workspace holds: at least 1, whole multiples of 64 if it can."""
    fits = int(head.workspace_mb * 2**20) // max(1, wide * head.dtype.itemsize)
    return max(1, min(limit, fits // 64 * 64 if fits >= 64 else fits))


def forward(
    head: Head,
    hidden: Tensor,  # [N, H]
    targets: Tensor,  # int64 [N], -1: not computed, results 0
    stats: tuple[str, ...],
    keep: bool,
) -> list[Tensor]:
    """logps, lse, stats (as row_forward), and the kept tile `[N, V]` or `[0, V]`."""
    vocab = head.weight.shape[0]
    rows = _counted(targets)
    x, y = _select(hidden, rows, head.dtype), targets if rows is None else targets[rows]
    kept = hidden.new_empty(kept_tile_shape(targets, head.weight, head.dtype, head.workspace_mb, keep), dtype=head.dtype)
    step = len(x) if len(kept) else _tile(head, vocab, len(x))
    buffer = kept if len(kept) else hidden.new_empty((min(step, len(x)), vocab), dtype=head.dtype)
    parts = []
    for start in range(0, len(x), max(1, step)):
        tile = buffer[: min(step, len(x) - start)]
        head.logits(x[start : start + step], 0, vocab, tile)
        parts.append(head.kernels.row_forward(tile[None], y[start : start + step], head.transform, stats))
    if not parts:  # nothing counts: results of the right dtypes from no rows
        parts.append(head.kernels.row_forward(buffer[None, :0], y, head.transform, stats))
    results = [torch.cat(column) for column in zip(*parts, strict=True)]
    if rows is not None:
        results = [r.new_zeros(targets.shape).index_copy(0, rows, r) for r in results]
    return [*results, kept]


def backward(
    head: Head,
    hidden: Tensor,  # [N, H]
    row_grads: RowGrads,
    kept: Tensor | None,  # [N, V], overwritten; None or [0, V]: recompute
    needs: tuple[bool, ...],  # hidden, weight, bias
) -> list[Tensor]:
    """dX `[N, H]`, dW `[V, H]`, db `[V]`, in the dtypes of their inputs; `[0]` where not needed."""
    vocab = head.weight.shape[0]
    need_hidden, need_weight, need_bias = needs
    rows = _counted(row_grads.targets)
    grads = row_grads.select(rows)
    x = _select(hidden, rows, head.dtype)
    count = len(x)
    accumulator = torch.float64 if head.dtype == torch.float64 else torch.float32
    dx = x.new_zeros(x.shape, dtype=accumulator) if need_hidden else None
    dw = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if need_weight else None
    db = torch.empty_like(head.bias) if need_bias and head.bias is not None else None

    whole = kept is not None and len(kept) > 0
    step = vocab if whole else _tile(head, max(1, count), vocab)
    buffer = kept if whole else x.new_empty(count * step)
    for start in range(0, vocab, step):
        stop = min(start + step, vocab)
        if whole:
            tile = buffer[:count]
        else:
            tile = buffer[: count * (stop - start)].view(count, stop - start)
            head.logits(x, start, stop, tile)
        # tile: logits -> d loss / d logits, in place
        head.kernels.row_backward(tile[None], *grads, head.transform, start, tile[None])
        if dx is not None:  # dX = sum over columns of D @ W
            _add_product(dx, tile, head.columns(start, stop))
        if dw is not None:  # dW = D.T @ X, whole in one product
            _write_product(dw[start:stop], tile.t(), x)
        if db is not None:  # db = sum over tokens of D
            db[start:stop] = tile.sum(dim=0, dtype=accumulator)
    if dx is not None and rows is not None:
        dx = dx.new_zeros(hidden.shape).index_copy(0, rows, dx)
    return [
        hidden.new_empty(0) if dx is None else dx.to(hidden.dtype),
        hidden.new_empty(0) if dw is None else dw,
        hidden.new_empty(0) if db is None else db,
    ]


def _float32_products(tensor: Tensor) -> bool:
    # cuBLAS can leave bf16 products in float32; the CPU's library cannot
    return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)


def _write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, rounded once"""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.dtype == torch.float32 and _float32_products(a):
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (float32) += a @ b"""
    if _float32_products(a):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(a, b)
