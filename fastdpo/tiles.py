"""The tile loop of the from-hidden path: library products and row kernels, never `[N, V]`.

Forward: tiles of tokens. A backend that streams takes a tile through cache, its logits float32; otherwise they live,
`[n, V]`, in one reused buffer of at most `workspace_mb` (two of half of it, where a GPU works ahead of the host).

Backward, one of three:
- compact: with `grad_tol` > 0 the forward kept the columns that hold the probability (compaction.py); where the head
  is frozen it kept, in their place, the gradient of each token's logp;
- kept: all logits fitted the workspace, and the forward left them (streamed: their exponentials): 6*N*V*H operations;
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
from .compaction import Compact, Sparse
from .inputs import result_dtype
from .options import Transform
from .parallel import VocabParallel
from .products import add_product, write_product
from .saved import Exponentials, Frozen, Saved, Tiles, counted

# Tokens a compact tile: more tokens share a column, fewer leave more columns empty. 256 keeps 3 to 7% of Gemma 3's
# vocabulary on real text where 512 keeps 9 to 14%, and still fills the library's products
_COMPACT_TOKENS = 256
# Of tiles whose columns are known at once where only the gradient of their logps is kept
_FROZEN_TILES = 8
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
    parallel: VocabParallel | None = None  # weight and bias are this rank's rows

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

    def widest(self) -> int:
        """Rows of the largest share of the head: ranks must take tiles of the same tokens."""
        return self.weight.shape[0] if self.parallel is None else max(self.parallel.sizes)

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
            and hasattr(self.kernels, "stream_forward")
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


def forward(
    head: Head,
    hidden: Tensor,  # [N, H]
    targets: Tensor,  # int64 [N], -1: not computed, results 0
    stats: tuple[str, ...],
    needs: tuple[bool, ...],  # gradients of hidden, weight, bias
) -> tuple[list[Tensor], Saved | None]:
    """logps, lse and stats (as row_forward), each `[N]`; and what spares the backward work, where there will be one."""
    rows = counted(targets)
    x, y = _select(hidden, rows, head.dtype), targets if rows is None else targets[rows]
    compact = any(needs) and head.grad_tol > 0
    if head.parallel is not None:
        head = head._replace(grad_tol=head.grad_tol / head.parallel.ranks)
    frozen = compact and not any(needs[1:])
    run = _streamed if head.streams() else _from_tiles
    if head.parallel is not None and compact and head.streams():
        run = _streamed_share
    step = _FROZEN_TILES * _COMPACT_TOKENS if frozen else max(1, len(x))
    parts, tiles, logits = [], [], None
    for start in range(0, max(1, len(x)), step):
        part = slice(start, start + step)
        results, kept, logits = run(head, x[part], y[part], stats, keep=any(needs))
        if frozen:
            kept = _freeze(head, RowGrads(y[part], results[0], results[1], None, None, None), x[part], kept)
        parts.append(results)
        tiles += [(start + first, start + last, compact) for first, last, compact in kept]
    results = [torch.cat(column) for column in zip(*parts, strict=True)]
    if head.parallel is not None and not compact:  # compact tiles needed it before
        results, _ = head.parallel.merge(results, y, stats)
    if rows is not None:
        results = [r.new_zeros(targets.shape).index_copy(0, rows, r) for r in results]
    return results, Saved(logits, tiles) if any(needs) else None


_Forward = tuple[list[Tensor], Tiles, Tensor | None]  # results, tiles, logits kept


def _streamed(head: Head, x: Tensor, y: Tensor, stats: tuple[str, ...], keep: bool) -> _Forward:
    step = _compact_step(len(x))
    fits = len(x) * head.weight.shape[0] * head.dtype.itemsize <= head.workspace_mb * 2**20
    whole = keep and head.grad_tol == 0 and fits and head.parallel is None
    results, kept, exponentials = head.kernels.stream_forward(
        *(x, head.weight, head.bias, y, head.transform, stats),
        *(step, head.grad_tol, keep, head.workspace_mb, whole, _bounds(head, x, y)),
    )
    if exponentials is not None:
        return results, [(0, len(x), exponentials)], None
    starts = range(0, len(x), step)
    return results, [(a, min(a + step, len(x)), tile) for a, tile in zip(starts, kept, strict=True)], None


def _streamed_share(head: Head, x: Tensor, y: Tensor, stats: tuple[str, ...], keep: bool) -> _Forward:
    """Between a tile's pass over this rank's columns and the choice among them, the ranks agree on its lse."""
    assert head.parallel is not None
    if not len(x):
        return _streamed(head, x, y, stats, keep)
    step, scan = _compact_step(len(x)), head.kernels.TileScan()
    bounds = _bounds(head, x, y)
    assert bounds is not None
    parts, tiles = [], []
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        results = scan.rows(
            *(x[part], head.weight, head.bias, y[part], bounds[part], head.transform, stats),
            *(head.grad_tol, head.workspace_mb),
        )
        results, apart = head.parallel.merge(results, y[part], stats)
        parts.append(results)
        tiles.append((start, min(start + step, len(x)), scan.choose(apart)))
    return [torch.cat(column) for column in zip(*parts, strict=True)], tiles, None


def _bounds(head: Head, x: Tensor, y: Tensor) -> Tensor | None:
    """Of a share of the head: the target's raw logit, wherever it is, float32 `[n]`; it bounds lse from below."""
    if head.parallel is None:
        return None
    bounds = x.new_zeros(len(x), dtype=torch.float32)
    owned = (y < len(head.weight)).nonzero().squeeze(1)
    for rows in owned.split(_COMPACT_TOKENS):
        weight = head.weight[y[rows]].to(head.dtype)
        bounds[rows] = torch.linalg.vecdot(x[rows].float(), weight.float())
        if head.bias is not None:
            bounds[rows] += head.bias[y[rows]].float()
    return head.parallel.sum_(bounds)


def _from_tiles(head: Head, x: Tensor, y: Tensor, stats: tuple[str, ...], keep: bool) -> _Forward:
    vocab, wide, count = head.weight.shape[0], head.widest(), max(1, len(x))
    compact = keep and head.grad_tol > 0
    whole = keep and not compact and len(x) * wide * head.dtype.itemsize <= head.workspace_mb * 2**20
    step = count if whole else head.tile(wide, count)
    if compact:
        step = min(step, _compact_step(count))
    # A GPU computes the next tile while the host waits for the number of columns of this one, where both fit
    half = head.tile(2 * wide, step)
    two = compact and head.queues() and step < count and 4 * half >= 3 * step
    step = half if two else step
    buffers = [x.new_empty((min(step, len(x)), vocab)) for _ in range(1 + two)]
    parts: list[list[Tensor]] = []
    search = compaction.Search(head.weight, head.transform, head.grad_tol if compact else 0.0, head.kernels)
    starts = range(0, count, step)
    for number, start in enumerate(starts):
        tile_x, tile_y = x[start : start + step], y[start : start + step]
        search.settle(len(buffers) - 1)  # the tile that was in this buffer
        logits = buffers[number % len(buffers)][: len(tile_x)]
        head.logits(tile_x, 0, vocab, logits)
        results = head.kernels.row_forward(logits[None], tile_y, head.transform, stats)
        share = None
        if compact and head.parallel is not None:
            results, apart = head.parallel.merge(results, tile_y, stats)
            share = torch.exp(-apart).to(results[0].dtype)
        search.add(logits, tile_y, results[1], share)
        parts.append(results)
    tiles: Tiles = [(a, min(a + step, len(x)), kept) for a, kept in zip(starts, search.finish(), strict=True)]
    return [torch.cat(column) for column in zip(*parts, strict=True)], tiles, buffers[0] if whole else None


def _compact_step(count: int) -> int:
    """Tokens a tile: about _COMPACT_TOKENS, none much smaller, in whole vectors."""
    tiles = max(1, round(count / _COMPACT_TOKENS))
    return max(16, -(-count // (16 * tiles)) * 16)


def _freeze(head: Head, rows: RowGrads, x: Tensor, tiles: Tiles) -> Tiles:
    """The compact tiles' gradients of logp in place of their columns."""
    unit = rows._replace(grad_logps=torch.ones_like(rows.logps))
    dx = _zeros(x, x.shape)
    _compact(head, x, unit, tiles, dx, None, None, add=False)
    return [
        (first, last, Frozen(kept.dropped, dx[first:last]) if isinstance(kept, (Compact, Sparse)) else None)
        for first, last, kept in tiles
    ]


def backward(
    head: Head,
    hidden: Tensor,  # [N, H]
    row_grads: RowGrads,
    saved: Saved | None,
    needs: tuple[bool, ...],  # hidden, weight, bias
) -> list[Tensor]:
    """dX `[N, H]`, dW `[V, H]`, db `[V]`, in the dtypes of their inputs; `[0]` where not needed."""
    rows = counted(row_grads.targets, saved)
    grads = row_grads.select(rows)
    x = _select(hidden, rows, head.dtype)
    dx = _zeros(x, x.shape) if needs[0] else None
    dw = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if needs[1] else None
    db = torch.empty_like(head.bias) if needs[2] and head.bias is not None else None

    tiles = [] if saved is None else saved.tiles
    dense = [torch.arange(first, last, device=x.device) for first, last, kept in tiles if kept is None]
    if len(dense) == len(tiles) or grads.grad_entropy is not None or grads.grad_logps is None:
        # The entropy's gradient lives in the tail too: exact
        _exact(head, x, grads, saved.logits if saved is not None else None, dx, dw, db)
    else:
        if dense:
            rest = torch.cat(dense)
            part_dx = None if dx is None else dx[rest]
            _exact(head, x[rest], grads.select(rest), None, part_dx, dw, db)
            if dx is not None and part_dx is not None:
                dx[rest] = part_dx
        _compact(head, x, grads, tiles, dx, dw, db, add=bool(dense))

    if dx is not None and head.parallel is not None:
        head.parallel.sum_(dx)
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
    tiles: Tiles,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    add: bool,  # dw and db hold the dense tiles' part; otherwise every row of them is written
) -> None:
    """The rows of dX of the tiles that are not dense, and their part of dW and db."""
    targets, logps, lse, _, grad_logps, _ = grads
    assert grad_logps is not None
    for first, last, kept in tiles:
        if isinstance(kept, Frozen) and dx is not None:
            dx[first:last] = grad_logps[first:last, None] * kept.hidden_grad
        if isinstance(kept, Exponentials):
            part = slice(first, last)
            factors = kept.scale * (grad_logps[part] * (-head.transform.logit_scale / head.transform.temperature))
            _from_exponentials(head, x[part], kept.values, factors, None if dx is None else dx[part], dw, db)
    sparse = [(first, kept) for first, _, kept in tiles if isinstance(kept, Sparse)]
    if sparse:
        head.kernels.stream_backward(
            x, head.weight, targets, logps, lse, grad_logps, head.transform, sparse, dx, dw, db, add
        )
    compact = [(first, last, kept) for first, last, kept in tiles if isinstance(kept, Compact)]
    if not compact:
        return
    if not add:
        for whole in (dw, db):
            if whole is not None:
                whole.zero_()
    inputs = []
    for first, last, kept in compact:
        part = slice(first, last)
        inputs.append((compaction.Rows(x[part], targets[part], logps[part], lse[part], grad_logps[part]), kept))
    # A GPU wants few and large products, and the logits' buffer is free by now
    sum_bytes = int(head.workspace_mb * 2**20) if head.queues() else compaction.SUM_BYTES
    tile_dx = compaction.backward(
        inputs, head.weight, head.transform, head.kernels, dx is not None, dw, db, not add, sum_bytes
    )
    if dx is not None:
        for (first, last, _), part_dx in zip(compact, tile_dx, strict=True):
            dx[first:last] = part_dx


def _from_exponentials(
    head: Head,
    x: Tensor,  # [n, H]
    values: Tensor,  # [V, n]
    factors: Tensor,  # [waves, n]: the gradient is values * factors
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """The factors stay outside of the products over the vocabulary: dX rounds nothing a second time, dW only X."""
    for part, factor in zip(head.kernels.waves(len(values)), factors, strict=True):
        if dx is not None:  # dX = sum over waves of factor (values.T @ W)
            dx += factor[:, None] * torch.mm(values[part].t(), head.columns(part.start, part.stop))
        if dw is not None:  # dW = values @ (factor X)
            write_product(dw[part], values[part], (factor[:, None] * x).to(head.dtype))
        if db is not None:  # db = values @ factor
            db[part] = torch.mv(values[part], factor.to(head.dtype))


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
    buffer = x.new_empty(0 if logits is not None else count * step)
    for start in range(0, vocab, step):
        stop = min(start + step, vocab)
        fresh = buffer[: count * (stop - start)]
        if streams:
            tile = fresh.view(stop - start, count)
            head.kernels.stream_gradient(x, head.weight, head.bias, *grads, head.transform, start, tile)
            tile = tile.t()
        else:
            tile = fresh.view(count, stop - start) if logits is None else logits
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


def _select(tensor: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (tensor if rows is None else tensor[rows]).to(dtype)


def _zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """For sums over tiles: float32, or float64 for float64 inputs."""
    return like.new_zeros(shape, dtype=result_dtype(like.dtype))
