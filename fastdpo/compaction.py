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

import itertools
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .options import Transform

# Beyond this share of the vocabulary a tile is dense: the products of the kept columns would cost more than they save
DENSE_SHARE = 0.25
# dW is summed in float32 over a range of the vocabulary at a time; this bounds the buffer
_SUM_BYTES = 64 << 20


class Compact(NamedTuple):
    """One tile's kept columns."""

    columns: Tensor  # int32 [k], ascending
    probs: Tensor  # [k, n], the products' dtype
    dropped: Tensor  # [n] float32 (float64 from float64), t
    mean_row: Tensor  # [H] float32, w


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
        `[n]`, in the units of dX; rounding comes on top.
    """
    slope = abs(transform.logit_scale) / transform.temperature
    farthest = (weight.double() - mean_row.double()).norm(dim=1).max()
    if transform.softcap is not None:
        farthest = torch.maximum(farthest, mean_row.double().norm())
    return grad_logps.double().abs() * dropped.double() * slope * farthest


def choose_columns(mass: Tensor, targets: Tensor, budget: float) -> Tensor:
    """The columns to keep, int32 `[k]` ascending: the smallest masses are dropped while their sum is within budget.

    Args:
        mass: `[V]`, the probability that each column holds in the tile. targets: int64 `[n]`, always kept.
    """
    ordered, order = mass.sort()
    dropped = ordered.cumsum(0, dtype=torch.float64) <= budget
    keep = torch.ones_like(mass, dtype=torch.bool)
    keep[order] = ~dropped
    keep[targets] = True
    return keep.nonzero().squeeze(1).int()


def compact_tile(
    logits: Tensor,  # [n, V]
    targets: Tensor,  # int64 [n]
    lse: Tensor,  # [n]
    weight: Tensor,  # [V, H]
    transform: Transform,
    grad_tol: float,
    kernels: ModuleType,
) -> Compact | None:
    """The tile's kept columns, from its logits; None where they would be too many."""
    mass = kernels.column_mass(logits, lse, transform)
    columns = choose_columns(mass, targets, grad_tol * len(targets))
    if len(columns) > DENSE_SHARE * len(mass):
        return None
    probs, dropped = kernels.column_probs(logits, lse, columns, transform)
    rest = mass.index_fill(0, columns.long(), 0)
    # In float32 by blocks of rows: the masses are too small for fp16, and weight is too large to be copied whole
    step = max(1, _SUM_BYTES // (4 * weight.shape[1]))
    blocks = zip(weight.split(step), rest.split(step), strict=True)
    mean_row = sum(part @ rows.to(rest.dtype) for rows, part in blocks) / rest.sum().clamp(min=1e-30)
    return Compact(columns, probs, dropped, mean_row)


def backward(
    tiles: list[tuple[Rows, Compact]],
    weight: Tensor,  # [V, H], any float dtype
    transform: Transform,
    kernels: ModuleType,
    need_hidden: bool,
    dw: Tensor | None,  # [V, H], zeros, or the dense tiles' part: the kept rows are added to it
    db: Tensor | None,  # [V], likewise
    zeros: bool,  # dw and db are zeros: no need to read them
) -> list[Tensor]:
    """dX of each tile, float32 `[n, H]`; dW and db into the tensors given.

    dW is summed in float32 over the union of the tiles' columns, a range of the vocabulary at a time.
    """
    slope = transform.logit_scale / transform.temperature
    # - (g t) w: what the dropped columns would have given, at their mean direction
    dx = [torch.outer(rows.grad_logps * compact.dropped * -slope, compact.mean_row) for rows, compact in tiles]
    if dw is None and db is None:
        union = None
        ranges = [(0, weight.shape[0])]
    else:
        union = torch.cat([compact.columns for _, compact in tiles]).unique()
        step = max(1, _SUM_BYTES // (4 * weight.shape[1]))
        edges = [0, *union[step::step].tolist(), weight.shape[0]]
        ranges = list(itertools.pairwise(edges))
    cuts = [_cuts(compact.columns, ranges) for _, compact in tiles]
    for number, (first, last) in enumerate(ranges):
        if union is not None:
            kept = union[(union >= first) & (union < last)].long()
            total = dx[0].new_zeros((len(kept), weight.shape[1])) if dw is not None else None
            total_bias = dx[0].new_zeros(len(kept)) if db is not None else None
        for (rows, compact), cut, tile_dx in zip(tiles, cuts, dx, strict=True):
            part = slice(cut[number], cut[number + 1])
            columns = compact.columns[part]
            grad = kernels.compact_gradient(compact.probs[part], columns, *rows[1:], transform)
            # dX += D @ weight[S]
            if need_hidden:
                tile_dx += torch.mm(grad.t(), weight[columns].to(grad.dtype))
            if union is None:
                continue
            slots = torch.searchsorted(kept, columns.long())
            if total is not None:  # dW[S] += D.T @ X
                kernels.add_weight_gradient(total, slots, grad, rows.hidden)
            if total_bias is not None:
                total_bias.index_add_(0, slots, grad.sum(1, dtype=total_bias.dtype))
        if union is not None:
            for whole, summed in ((dw, total), (db, total_bias)):
                if whole is not None and summed is not None:
                    whole.index_copy_(0, kept, (summed if zeros else summed + whole[kept]).to(whole.dtype))
    return dx


def _cuts(columns: Tensor, ranges: list[tuple[int, int]]) -> list[int]:
    """Where the ranges of the vocabulary begin in ascending columns; one host synchronisation on a GPU."""
    edges = [ranges[0][0], *(last for _, last in ranges)]
    return torch.searchsorted(columns, columns.new_tensor(edges)).tolist()
