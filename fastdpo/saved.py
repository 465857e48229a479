"""What the from-hidden forward keeps for its backward (tiles.py), and how it travels: through autograd, and packed.

Rows here are the tokens that count, in order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compaction import Compact, Sparse
from .inputs import result_dtype


class Frozen(NamedTuple):
    """What a tile keeps where the head needs no gradient: dX but for the factor d loss / d logp."""

    dropped: Tensor  # [n], as Compact's
    hidden_grad: Tensor  # [n, H] float32, d logp / d hidden


class Exponentials(NamedTuple):
    """Every logit of an exact, streamed forward: d logp / d raw = -slope * values * scale of the column's wave."""

    values: Tensor  # bf16 [V, n]
    scale: Tensor  # float32 [waves, n]


Kept = Compact | Sparse | Frozen | Exponentials
Tiles = list[tuple[int, int, Kept | None]]  # first row, last row + 1; None: dense, or nothing kept


class Saved(NamedTuple):
    """What a forward keeps for its backward beside its inputs and results. Rows: those that count."""

    logits: Tensor | None  # [n, V], overwritten by the backward
    tiles: Tiles


_KINDS: tuple[Any, ...] = (Compact, Sparse, Frozen, Exponentials)


def flatten(saved: Saved | None) -> tuple[Any, list[Tensor]]:
    """(layout, tensors) for save_for_backward, which frees them in time and knows gradient checkpointing."""
    if saved is None:
        return None, []
    tensors = [] if saved.logits is None else [saved.logits]
    tiles = [(first, last, None if kept is None else _KINDS.index(type(kept))) for first, last, kept in saved.tiles]
    return (saved.logits is not None, tiles), [*tensors, *(x for *_, kept in saved.tiles for x in kept or ())]


def unflatten(layout: Any, tensors: list[Tensor]) -> Saved | None:
    if layout is None:
        return None
    has_logits, tiles = layout
    rest = iter(tensors)
    # .data: the backward's overwriting is its own affair, not autograd's
    logits = next(rest).data if has_logits else None
    found: Tiles = []
    for first, last, kind in tiles:
        made = None if kind is None else _KINDS[kind](*itertools.islice(rest, len(_KINDS[kind]._fields)))
        found.append((first, last, made))
    return Saved(logits, found)


def pack(saved: Saved | None, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """What tiles keep as four tensors: layout int64 `[tiles, 5]`, then all that is int32, P, and floats, end to end.

    A row of the layout: first, last, kind (-1: nothing kept), columns, entries; see unpack.
    """
    layout: list[tuple[int, ...]] = []
    pools: dict[str, list[Tensor]] = {"int": [], "probs": [], "float": []}
    for first, last, kept in () if saved is None else saved.tiles:
        if kept is None or isinstance(kept, Exponentials):
            layout.append((first, last, -1, 0, 0))
            continue
        columns = 0 if isinstance(kept, Frozen) else len(kept.columns)
        entries = len(kept.entries) if isinstance(kept, Sparse) else 0
        layout.append((first, last, _KINDS.index(type(kept)), columns, entries))
        for name, part in kept._asdict().items():
            pools[_pool(name)].append(part.flatten())
    dtypes = (torch.int32, dtype, result_dtype(dtype))
    rest = [
        torch.cat(parts) if parts else torch.empty(0, dtype=kind, device=device)
        for parts, kind in zip(pools.values(), dtypes, strict=True)
    ]
    return [torch.tensor(layout, dtype=torch.int64).view(-1, 5).to(device), *rest]


def unpack(packed: Sequence[Tensor], width: int) -> Saved | None:
    """The inverse of pack. width: H."""
    layout, *tensors = packed
    pools = dict(zip(("int", "probs", "float"), tensors, strict=True))
    tiles: Tiles = []
    for first, last, kind, k, e in layout.tolist():
        n, parts = last - first, []
        shapes = {
            "columns": (k,),
            "starts": (k + 1,),
            "entries": (e,),
            "probs": (k, n),
            "dropped": (n,),
            "mean_row": (width,),
            "hidden_grad": (n, width),
        }
        for name in () if kind < 0 else _KINDS[kind]._fields:
            pool, size = _pool(name), math.prod(shapes[name])
            parts.append(pools[pool][:size].view(shapes[name]))
            pools[pool] = pools[pool][size:]
        tiles.append((first, last, _KINDS[kind](*parts) if parts else None))
    return Saved(None, tiles) if tiles else None


def _pool(field: str) -> str:
    return "probs" if field == "probs" else "int" if field in ("columns", "starts", "entries") else "float"


def dropped_mass(saved: Saved | None, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """`[N]`, of `dtype`: probability that a token's gradient leaves out; 0 where it is exact."""
    result = torch.zeros(targets.shape, dtype=dtype, device=targets.device)
    if saved is not None:
        rows = counted(targets, saved)
        for first, last, kept in saved.tiles:
            if isinstance(kept, (Compact, Sparse, Frozen)):
                result[slice(first, last) if rows is None else rows[first:last]] = kept.dropped
    return result


def counted(targets: Tensor, saved: Saved | None = None) -> Tensor | None:
    """Indices of the rows that count; None where all do.

    One host synchronisation on a GPU, none where `saved` tells how many they are.
    """
    there = targets >= 0
    known = saved is not None and saved.tiles
    rows = there.nonzero_static(size=known[-1][1]) if known else there.nonzero()
    return None if len(rows) == len(targets) else rows.squeeze(1)
