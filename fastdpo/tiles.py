"""The tile loop of the from-hidden path: library products and row kernels, never `[N, V]`.

Forward: tiles of tokens. A backend that streams takes a tile through cache, its logits float32; otherwise they live,
`[n, V]`, in one reused buffer of at most `workspace_mb` (two of half of it, where a GPU works ahead of the host).

Backward, one of three:
- compact: with `grad_tol` > 0 the forward kept the columns that hold the probability (compaction.py);
- kept: all logits fitted the workspace, and the forward left them: 6*N*V*H operations;
- recomputed: tiles of vocabulary columns over all tokens, 8*N*V*H operations. A tile `[N, w]` owns w whole rows of
  dW, so dW is summed inside one product (float32) and rounded once, with no float32 `[V, H]` buffer. Tiles whose
  softmax is not sparse ("dense") go this way too.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import compaction
from .compaction import Compact
from .inputs import result_dtype
from .options import Transform
from .products import add_product, write_product

# Tokens a compact tile: more tokens share a column, fewer leave more columns empty. 256 keeps 3 to 7% of Gemma 3's
# vocabulary on real text where 512 keeps 9 to 14%, and still fills the library's products
_COMPACT_TOKENS = 256
# Where weight is not in the dtype of the product (autocast), this many bytes of it are cast at a time
_CAST_BYTES = 32 << 20


class Head(NamedTuple):
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    transform: Transform
    dtype: torch.dtype  # of the products
    grad_tol: float  # 0: exact
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
            if self.bias is None:
                torch.mm(hidden, self.columns(first, last).t(), out=block)
            else:
                torch.addmm(self.bias[first:last].to(self.dtype), hidden, self.columns(first, last).t(), out=block)

    def tile(self, wide: int, limit: int) -> int:
        """How many rows (or columns) of `wide` logits the workspace holds: at least 1, multiples of 64 if it can."""
        fits = int(self.workspace_mb * 2**20) // max(1, wide * self.dtype.itemsize)
        return max(1, min(limit, fits // 64 * 64 if fits >= 64 else fits))

    def queues(self) -> bool:
        """Whether the kernels' launches return before their work is done."""
        return getattr(self.kernels, "QUEUES", False)

    def streams(self) -> bool:
        """Whether the backend takes tiles from hidden states through cache."""
        return (
            self.dtype == torch.bfloat16
            and self.weight.dtype in (torch.bfloat16, torch.float32)
            and self.weight.stride(1) == 1
            and self.weight.shape[1] % 2 == 0
            and hasattr(self.kernels, "stream_tile")
            and self.kernels.streams()
        )


class RowGrads(NamedTuple):
    """What the forward left and what autograd brings, each `[N]`."""

    targets: Tensor  # int64
    logps: Tensor
    lse: Tensor
    entropy: Tensor | None
    grad_logps: Tensor | None
    grad_entropy: Tensor | None

    def select(self, rows: Tensor | slice | None) -> RowGrads:
        if rows is None:
            return self
        parts: list[Any] = [None if x is None else x[rows] for x in self]
        return RowGrads(*parts)


class Saved(NamedTuple):
    """What a forward keeps for its backward beside its inputs and results. [n]: the rows that count."""

    rows: Tensor | None  # int64 [n]: those that count; None: all
    logits: Tensor | None  # [n, V], overwritten by the backward
    tiles: list[tuple[int, int, Compact | None]]  # first row, last row + 1; None: dense


def flatten(saved: Saved | None) -> tuple[Any, list[Tensor]]:
    """(layout, tensors) for save_for_backward, which frees them in time and knows gradient checkpointing."""
    if saved is None:
        return None, []
    there = [x is not None for x in saved[:2]]
    tiles = [(first, last, compact is not None) for first, last, compact in saved.tiles]
    tensors = [*saved[:2], *(x for tile in saved.tiles for x in tile[2] or ())]
    return (there, tiles), [x for x in tensors if x is not None]


def unflatten(layout: Any, tensors: list[Tensor]) -> Saved | None:
    if layout is None:
        return None
    there, tiles = layout
    rest = iter(tensors)
    # .data: the backward's overwriting is its own affair, not autograd's
    rows, logits = (next(rest).data if x else None for x in there)
    return Saved(
        rows, logits, [(a, b, Compact(*(next(rest) for _ in range(4))) if kept else None) for a, b, kept in tiles]
    )


def forward(
    head: Head,
    hidden: Tensor,  # [N, H]
    targets: Tensor,  # int64 [N], -1: not computed, results 0
    stats: tuple[str, ...],
    keep: bool,
) -> tuple[list[Tensor], Saved | None]:
    """logps, lse and stats (as row_forward), each `[N]`; and, where `keep`, what spares the backward work."""
    vocab = head.weight.shape[0]
    rows = _counted(targets)
    x, y = _select(hidden, rows, head.dtype), targets if rows is None else targets[rows]
    compact, streams = keep and head.grad_tol > 0, head.streams()
    fits = len(x) * vocab * head.dtype.itemsize <= head.workspace_mb * 2**20
    whole = keep and not compact and not streams and fits
    # Tokens a tile: as many logits as the workspace holds, where there are any; as few as compaction wants
    step = max(1, len(x)) if whole or streams else head.tile(vocab, max(1, len(x)))
    if compact or streams:
        step = min(step, _COMPACT_TOKENS)
    # A GPU computes the next tile while the host waits for the number of columns of this one, where both fit
    two = compact and head.queues() and step < len(x) and head.tile(2 * vocab, step) == step
    buffers = [] if streams else [x.new_empty((min(step, len(x)), vocab)) for _ in range(1 + two)]
    parts: list[list[Tensor]] = []
    search = compaction.Search(head.weight, head.transform, head.grad_tol if compact else 0.0, head.kernels)
    starts = range(0, len(x), step)
    for number, start in enumerate(starts):
        tile_x, tile_y = x[start : start + step], y[start : start + step]
        tol = head.grad_tol if search.worthwhile() else 0.0
        if streams:
            results, kept = head.kernels.stream_tile(
                tile_x, head.weight, head.bias, tile_y, head.transform, stats, tol, head.workspace_mb
            )
            search.found.append(kept)
        else:
            search.settle(len(buffers) - 1)  # the tile that was in this buffer
            logits = buffers[number % len(buffers)][: len(tile_x)]
            head.logits(tile_x, 0, vocab, logits)
            results = head.kernels.row_forward(logits[None], tile_y, head.transform, stats)
            if tol > 0:
                search.add(logits, tile_y, results[1])
            else:
                search.found.append(None)
        parts.append(results)
    tiles = [(start, min(start + step, len(x)), kept) for start, kept in zip(starts, search.finish(), strict=True)]
    if not parts:  # nothing counts: results of the right dtypes from no rows
        parts.append(head.kernels.row_forward(x.new_empty((1, 0, vocab)), y, head.transform, stats))
    results = [torch.cat(column) for column in zip(*parts, strict=True)]
    if rows is not None:
        results = [r.new_zeros(targets.shape).index_copy(0, rows, r) for r in results]
    return results, Saved(rows, buffers[0] if whole else None, tiles) if keep else None


def dropped_mass(saved: Saved | None, targets: Tensor) -> Tensor:
    """`[N]` float32: probability that a token's gradient leaves out; 0 where it is exact."""
    result = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    if saved is not None:
        for first, last, compact in saved.tiles:
            if compact is not None:
                result[slice(first, last) if saved.rows is None else saved.rows[first:last]] = compact.dropped
    return result


def backward(
    head: Head,
    hidden: Tensor,  # [N, H]
    row_grads: RowGrads,
    saved: Saved | None,
    needs: tuple[bool, ...],  # hidden, weight, bias
) -> list[Tensor]:
    """dX `[N, H]`, dW `[V, H]`, db `[V]`, in the dtypes of their inputs; `[0]` where not needed."""
    rows = _counted(row_grads.targets) if saved is None else saved.rows
    grads = row_grads.select(rows)
    x = _select(hidden, rows, head.dtype)
    dx = _zeros(x, x.shape) if needs[0] else None
    dw = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if needs[1] else None
    db = torch.empty_like(head.bias) if needs[2] and head.bias is not None else None

    tiles = [] if saved is None else [t for t in saved.tiles if t[2] is not None]
    if tiles and grads.grad_entropy is None and grads.grad_logps is not None:
        dense = [slice(first, last) for first, last, compact in saved.tiles if compact is None]  # type: ignore[union-attr]
        rest = torch.cat([torch.arange(len(x), device=x.device)[part] for part in dense]) if dense else None
        if rest is None:
            for whole in (dw, db):
                if whole is not None:
                    whole.zero_()
        else:
            part_dx = None if dx is None else dx[rest]
            _exact(head, x[rest], grads.select(rest), None, part_dx, dw, db)
            if dx is not None and part_dx is not None:
                dx[rest] = part_dx
        _compact(head, x, grads, tiles, dx, dw, db, zeros=rest is None)
    else:  # the entropy's gradient lives in the tail too: exact
        _exact(head, x, grads, saved.logits if saved is not None else None, dx, dw, db)

    if dx is not None and rows is not None:
        dx = dx.new_zeros(hidden.shape).index_copy(0, rows, dx)
    return [
        hidden.new_empty(0) if dx is None else dx.to(hidden.dtype),
        hidden.new_empty(0) if dw is None else dw,
        hidden.new_empty(0) if db is None else db,
    ]


def _compact(
    head: Head,
    x: Tensor,
    grads: RowGrads,
    tiles: list[tuple[int, int, Compact | None]],
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    zeros: bool,
) -> None:
    inputs = []
    for first, last, compact in tiles:
        part = slice(first, last)
        targets, logps, lse, _, grad_logps, _ = grads.select(part)
        assert grad_logps is not None and compact is not None
        inputs.append((compaction.Rows(x[part], targets, logps, lse, grad_logps), compact))
    # A GPU wants few and large products, and the logits' buffer is free by now
    sum_bytes = int(head.workspace_mb * 2**20) if head.queues() else compaction.SUM_BYTES
    tile_dx = compaction.backward(
        inputs, head.weight, head.transform, head.kernels, dx is not None, dw, db, zeros, sum_bytes
    )
    if dx is not None:
        for (first, last, _), part_dx in zip(tiles, tile_dx, strict=True):
            dx[first:last] = part_dx


def _exact(
    head: Head,
    x: Tensor,
    grads: RowGrads,
    logits: Tensor | None,  # [n, V] kept by the forward, overwritten
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    count, vocab, streams = len(x), head.weight.shape[0], head.streams()
    step = vocab if logits is not None else head.tile(max(1, count), vocab)
    buffer = x.new_empty(0 if logits is not None or streams else count * step)
    for start in range(0, vocab, step):
        stop = min(start + step, vocab)
        if streams:
            tile = head.kernels.stream_gradient(x, head.weight, head.bias, *grads, head.transform, start, stop).t()
        else:
            tile = logits if logits is not None else buffer[: count * (stop - start)].view(count, stop - start)
            if logits is None:
                head.logits(x, start, stop, tile)
            # tile: logits -> d loss / d logits, in place
            head.kernels.row_backward(tile[None], *grads, head.transform, start, tile[None])
        if dx is not None:  # dX = sum over columns of D @ W
            add_product(dx, tile, head.columns(start, stop))
        if dw is not None:  # dW = D.T @ X, whole in one product
            write_product(dw[start:stop], tile.t(), x)
        if db is not None:  # db = sum over tokens of D
            db[start:stop] = tile.sum(dim=0, dtype=result_dtype(head.dtype))


def _counted(targets: Tensor) -> Tensor | None:
    """Indices of the rows that count; None where all do. One host synchronisation on a GPU."""
    rows = (targets >= 0).nonzero().squeeze(1)
    return None if len(rows) == len(targets) else rows


def _select(tensor: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (tensor if rows is None else tensor[rows]).to(dtype)


def _zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """For sums over tiles: float32, or float64 for float64 inputs."""
    return like.new_zeros(shape, dtype=result_dtype(like.dtype))
