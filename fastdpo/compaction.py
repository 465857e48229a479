"""Which vocabulary columns a tile of tokens keeps for its backward, what the rest is worth, and the gradients.

The softmax of a trained model is nearly empty: over a tile of n tokens a few percent of the columns hold all but
`grad_tol` of the probability. For those columns S (every target among them) the forward saves P = softmax[:, S]; per
token it knows the dropped mass t = 1 - sum_S P; and it saves w, the mean of the dropped rows of weight, weighted by
their mass. With g = d loss / d logp and D = g (1[S = y] - P), all times dz/dlogits:

    dX = D @ weight[S] - (g t) ⊗ w          dW[S] += D.T @ X          db[S] += D.sum(tokens)

The term in w gives the dropped mass back at its mean direction, so each row of the logits gradient still sums to
zero. What is left of the error: `hidden_error_bound`.
"""

from __future__ import annotations

from collections import deque
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .options import Transform
from .products import add_product, keeps_float32, product

# Beyond this share of the vocabulary a tile is dense: the products of the kept columns would cost more than they save
DENSE_SHARE = 0.25
# Tiles whose mean rows are computed in one reading of weight, which costs a GPU about as much as a tile's logits
_MEAN_TILES = 16
# dW is summed in float32 over a range of the vocabulary at a time; this bounds the buffer, and weight that is cast
SUM_BYTES = 64 << 20


class Compact(NamedTuple):
    """One tile's kept columns."""

    columns: Tensor  # int32 [k], ascending
    probs: Tensor  # [k, n], the products' dtype
    dropped: Tensor  # [n] float32 (float64 from float64), t
    mean_row: Tensor  # [H] float32, w


class Sparse(NamedTuple):
    """The same of a backend that streams: of P only the entries worth their memory, a fifth on real text."""

    columns: Tensor  # int32 [k], ascending
    starts: Tensor  # int32 [k + 1]: column c has entries starts[c] .. starts[c + 1] - 1
    entries: Tensor  # int32 [e]: token << 16 | bits of p in bf16
    dropped: Tensor  # [n] float32, all that no entry holds
    mean_row: Tensor  # [H] float32, of the columns dropped whole, about by their mass


class Rows(NamedTuple):
    """A tile's tokens in the backward, each `[n]` but hidden `[n, H]`."""

    hidden: Tensor
    targets: Tensor
    logps: Tensor
    lse: Tensor
    grad_logps: Tensor


def hidden_error_bound(
    grad_logps: Tensor, dropped: Tensor, weight: Tensor, mean_row: Tensor, transform: Transform
) -> Tensor:
    """Upper bound of the error of dX, per token, in the norm of a row.

    The error of token i is g_i times the sum over dropped columns of p_v (c_v weight[v] - c w), with 0 <= |c_v| <= c =
    |logit_scale| / temperature the slope of the transform, so its norm is at most
    |g_i| t_i c max_v max(|weight[v] - w|, |w|); without a softcap c_v = c and the |w| falls away.

    Args:
        grad_logps, dropped: `[n]`. weight: `[V, H]`. mean_row: `[H]`, of the tile.

    Returns:
        `[n]`, in the units of dX; rounding comes on top. Of a screened tile (kernels/cpu/screen.h) `dropped` is an
        estimate t', and the bound holds with t + |t' - t| in its place.
    """
    slope = abs(transform.logit_scale) / transform.temperature
    farthest = (weight.double() - mean_row.double()).norm(dim=1).max()
    if transform.softcap is not None:
        farthest = torch.maximum(farthest, mean_row.double().norm())
    return grad_logps.double().abs() * dropped.double() * slope * farthest


def choose_columns(mass: Tensor, targets: Tensor, budget: float) -> Tensor:
    """Which columns to keep, bool `[V]`: the smallest masses are dropped while their sum is within budget.

    Args:
        mass: `[V]`, the probability that each column holds in the tile.
        targets: int64 `[n]`, always kept; V: on another rank.
    """
    budget = max(budget, 1e-30)
    ordered, order = mass.sort(stable=True)
    # Summed in integers: a GPU's running sum of floats differs from run to run. A NaN or infinity is beyond any budget
    units = (torch.where(ordered <= budget, ordered / budget, 2.0) * 2**40).long()
    keep = mass.new_empty(len(mass) + 1, dtype=torch.bool)  # the last: for targets on another rank
    keep[order] = units.cumsum(0) > 2**40
    return keep.index_fill_(0, targets, True)[:-1]


class _Number:
    """An integer on its way from a GPU to the host: int() waits for it, and for nothing that was queued after it."""

    def __init__(self, value: Tensor) -> None:
        self._value = value.to("cpu", non_blocking=True)
        self._there = torch.cuda.Event() if value.is_cuda else None
        if self._there is not None:
            self._there.record(torch.cuda.current_stream(value.device))

    def __int__(self) -> int:
        if self._there is not None:
            self._there.synchronize()
        return int(self._value)


class _Queued(NamedTuple):
    """A tile whose columns are chosen, and may still have to be counted."""

    tile: int
    logits: Tensor  # [n, V]
    lse: Tensor  # [n]
    keep: Tensor  # bool [V]
    rest: Tensor  # [V], mass of the columns dropped
    number: _Number  # of columns kept
    share: Tensor | None  # [n]


class _Gathered(NamedTuple):
    """A tile that lacks its mean row."""

    tile: int
    columns: Tensor
    probs: Tensor
    dropped: Tensor
    rest: Tensor  # [V]


class Search:
    """The kept columns of one forward's tiles, in order.

    How many a tile keeps, the host must know, and a GPU is still at work when it asks. So `add` only queues, and
    `settle` gathers: with another tile queued in between, the GPU does not stand still while the host waits. A tile's
    logits must stay as they are until it is settled.
    """

    def __init__(self, weight: Tensor, transform: Transform, grad_tol: float, kernels: ModuleType) -> None:
        self.weight, self.transform, self.grad_tol, self.kernels = weight, transform, grad_tol, kernels
        self.found: list[Compact | None] = []  # by tile; None: dense, or not searched
        self._queued: deque[_Queued] = deque()
        self._gathered: list[_Gathered] = []

    def add(self, logits: Tensor, targets: Tensor, lse: Tensor, share: Tensor | None = None) -> None:
        """The next tile: logits `[n, V]`, targets int64 `[n]`, lse `[n]`.

        share `[n]`: probability that these columns hold, where other ranks hold others; None: all of it.
        """
        settled = len(self.found) - len(self._queued)
        sparse = len(self._gathered) + sum(compact is not None for compact in self.found)
        # Where most tiles turn out dense, the search is not worth its time
        if self.grad_tol == 0 or not len(targets) or 2 * (settled - sparse) > settled + 1:
            self.found.append(None)
            return
        mass = self.kernels.column_mass(logits, lse, self.transform)
        keep = choose_columns(mass, targets, self.grad_tol * len(targets))
        rest = mass.masked_fill(keep, 0)
        self._queued.append(_Queued(len(self.found), logits, lse, keep, rest, _Number(keep.sum()), share))
        self.found.append(None)

    def settle(self, but: int = 0) -> None:
        """Gather P of the tiles added, but of the last `but`. The host waits for a number of columns a tile."""
        while len(self._queued) > but:
            tile, logits, lse, keep, rest, number, share = self._queued.popleft()
            count = int(number)
            if count > DENSE_SHARE * len(keep):
                continue
            columns = keep.nonzero_static(size=count).squeeze(1).int()
            probs, dropped = self.kernels.column_probs(logits, lse, columns, self.transform)
            if share is not None:  # kernels take 1 for granted
                dropped = (dropped - (1 - share)).clamp(min=0)
            self._gathered.append(_Gathered(tile, columns, probs, dropped, rest))
            if len(self._gathered) == _MEAN_TILES:
                self._add_means()

    def finish(self) -> list[Compact | None]:
        """What each tile keeps."""
        self.settle()
        self._add_means()
        return self.found

    def _add_means(self) -> None:
        if self._gathered:
            means = mean_rows(torch.stack([tile.rest for tile in self._gathered]), self.weight)
            for (tile, columns, probs, dropped, _), mean_row in zip(self._gathered, means, strict=True):
                self.found[tile] = Compact(columns, probs, dropped, mean_row)
            self._gathered = []


def mean_rows(rest: Tensor, weight: Tensor) -> Tensor:
    """rest `[T, V]`, weight `[V, H]` -> `[T, H]`: the mean of weight's rows, weighted by rest; 0 where rest is."""
    rest = rest / rest.amax(1, keepdim=True).clamp(min=1e-30)  # masses may be too small for fp16
    step = len(weight)
    if keeps_float32(weight):
        rest = rest.to(weight.dtype)
    elif weight.dtype != rest.dtype:  # too large to be cast whole
        step = max(1, SUM_BYTES // (rest.element_size() * weight.shape[1]))
    blocks = zip(rest.split(step, dim=1), weight.split(step), strict=True)
    total = torch.stack([product(part, rows.to(rest.dtype)) for part, rows in blocks]).sum(0)
    return total / rest.sum(1, keepdim=True, dtype=total.dtype).clamp(min=1e-30)


def backward(
    tiles: list[tuple[Rows, Compact]],
    weight: Tensor,  # [V, H], any float dtype
    transform: Transform,
    kernels: ModuleType,
    need_hidden: bool,
    dw: Tensor | None,  # [V, H], zeros, or the dense tiles' part: the kept rows are added to it
    db: Tensor | None,  # [V], likewise
    zeros: bool,  # dw and db are zeros: no need to read them
    sum_bytes: int = SUM_BYTES,
) -> list[Tensor]:
    """dX of each tile, float32 `[n, H]`; dW and db into the tensors given.

    dW is summed in float32 over the union of the tiles' columns, a range of the vocabulary at a time.
    """
    slope = transform.logit_scale / transform.temperature
    # - (g t) w: what the dropped columns would have given, at their mean direction
    dx = [torch.outer(rows.grad_logps * compact.dropped * -slope, compact.mean_row) for rows, compact in tiles]
    step = max(1, sum_bytes // (4 * weight.shape[1]))
    union: Tensor | None = None
    slots: list[Tensor] = []
    cuts = [[0, len(compact.columns)] for _, compact in tiles]
    if dw is not None or db is not None:
        union, slots, cuts = _union([compact.columns for _, compact in tiles], step)
    for number in range(len(cuts[0]) - 1):
        if union is not None:
            kept = union[number * step : (number + 1) * step]
            total = dx[0].new_zeros((len(kept), weight.shape[1])) if dw is not None else None
            total_bias = dx[0].new_zeros(len(kept)) if db is not None else None
        for tile, ((rows, compact), tile_dx) in enumerate(zip(tiles, dx, strict=True)):
            part = slice(*cuts[tile][number : number + 2])
            columns = compact.columns[part]
            grad = kernels.compact_gradient(compact.probs[part], columns, *rows[1:], transform)
            # dX += D @ weight[S]
            if need_hidden:
                add_product(tile_dx, grad.t(), weight[columns].to(grad.dtype))
            if union is None:
                continue
            here = slots[tile][part] - number * step
            if total is not None:  # dW[S] += D.T @ X
                kernels.add_weight_gradient(total, here, grad, rows.hidden)
            if total_bias is not None:
                total_bias.index_add_(0, here, grad.sum(1, dtype=total_bias.dtype))
        if union is not None:
            for whole, summed in ((dw, total), (db, total_bias)):
                if whole is not None and summed is not None:
                    whole.index_copy_(0, kept, (summed if zeros else summed + whole[kept]).to(whole.dtype))
    return dx


def _union(columns: list[Tensor], step: int) -> tuple[Tensor, list[Tensor], list[list[int]]]:
    """The tiles' columns together, int64 `[u]` ascending; where in it each tile's are; and where in each tile's every
    `step` of it begin and end. Two host synchronisations on a GPU."""
    union, slots = torch.cat(columns).long().unique(return_inverse=True)
    by_tile = list(slots.split([len(part) for part in columns]))
    edges = torch.arange(0, len(union) + step, step, device=union.device)
    return union, by_tile, torch.stack([torch.searchsorted(part, edges) for part in by_tile]).tolist()
