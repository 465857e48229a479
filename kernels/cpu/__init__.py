"""C++ backend (AVX2, AVX-512; float32, bf16, fp16): the functions of fastdpo/eager.py, specification included."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastdpo.compaction import Sparse
from fastdpo.eager import add_weight_gradient, column_mass, column_probs
from fastdpo.options import Transform
from fastdpo.saved import Exponentials

from .build import BuildError, library

__all__ = [
    "TileScan",
    "add_weight_gradient",
    "column_mass",
    "column_probs",
    "compact_gradient",
    "pair_sigmoid",
    "row_backward",
    "row_forward",
    "sequence_sums",
    "stream_backward",
    "stream_forward",
    "stream_gradient",
    "streams",
    "unavailable",
    "waves",
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
    """Whether the stream_ functions run on this CPU: it needs bf16 products (AVX512-BF16 or AMX)."""
    return torch.ops.fastdpo_cpu.streams()


def stream_forward(
    hidden: Tensor,  # bf16 [N, H], H even
    weight: Tensor,  # bf16 or float32 [V, H], dense rows
    bias: Tensor | None,  # [V]
    targets: Tensor,  # int64 [N], in [0, V]; V: on another rank, its logit counts as 0
    transform: Transform,
    stats: tuple[str, ...],
    tile_tokens: int,
    grad_tol: float,
    search: bool,
    workspace_mb: float,
    keep: bool = False,
    bounds: Tensor | None = None,  # float32 [N]: a raw logit of each row, over all ranks; None: the target's
) -> tuple[list[Tensor], list[Sparse | None], Exponentials | None]:
    """row_forward's results straight from hidden states (float32 logits, never as a whole); each tile's kept columns.

    None in their place without `search`, or where grad_tol is 0 or the softmax not sparse enough (or the workspace too
    small to see it). With grad_tol > 0 columns that cannot matter are summed from 8-bit products (screen.h).
    With grad_tol = 0 and `keep`, what the exact backward needs of every logit; None where one left bf16's range.
    """
    out = torch.ops.fastdpo_cpu.stream_forward(
        *(hidden.contiguous(), weight, _float(bias), targets, *transform),
        *(bool(stats), tile_tokens, grad_tol, search, workspace_mb, keep, bounds),
    )
    count = 2 + (len(_STATS) if stats else 0)
    results = _ordered(out[:count], stats)
    exponentials = None
    if keep:
        exponentials = Exponentials(*out[count : count + 2]) if len(out[count]) else None
        count += 2
    size = len(Sparse._fields)
    # starts: one more than columns, of which there may be none
    tiles = [Sparse(*out[i : i + size]) if len(out[i + 1]) else None for i in range(count, len(out), size)]
    return results, tiles, exponentials


class TileScan:
    """stream_forward for ranks that share a vocabulary: of each tile `rows`, then `choose`."""

    def __init__(self) -> None:
        self._scan = torch.classes.fastdpo_cpu.TileScan()

    def rows(
        self,
        hidden: Tensor,  # [n, H], and so on as in stream_forward
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        bounds: Tensor,  # float32 [n]: a raw logit of each row, over all ranks
        transform: Transform,
        stats: tuple[str, ...],
        grad_tol: float,
        workspace_mb: float,
    ) -> list[Tensor]:
        """row_forward's results of one tile over this rank's columns."""
        out = self._scan.rows(
            *(hidden.contiguous(), weight, _float(bias), targets, bounds, *transform),
            *(bool(stats), grad_tol, workspace_mb),
        )
        return _ordered(out, stats)

    def choose(self, apart: Tensor) -> Sparse | None:
        """The tile's kept columns, by probabilities under the lse of all ranks.

        apart: float64 `[n]`, that lse less this rank's.
        """
        out = self._scan.choose(apart)
        return Sparse(*out) if len(out[1]) else None  # starts: of no columns too there is one


def waves(vocab: int) -> Iterator[slice]:
    """The ranges of columns that share a row of `Exponentials.scale`: kWaveRows of stream.h."""
    return (slice(start, min(start + 32768, vocab)) for start in range(0, vocab, 32768))


def stream_backward(
    hidden: Tensor,  # bf16 [N, H]; weight and targets as in stream_forward
    weight: Tensor,
    targets: Tensor,
    logps: Tensor,  # [N]
    lse: Tensor,
    grad_logps: Tensor,
    transform: Transform,
    tiles: list[tuple[int, Sparse]],  # first token; columns
    dx: Tensor | None,  # float32 [N, H]: the tiles' rows are written
    dw: Tensor | None,  # [V, H] like weight
    db: Tensor | None,  # [V]
    add: bool,  # dw and db hold another part already; otherwise every row of them is written
) -> None:
    """The compact backward (compaction.py) of all tiles at once, in float32 and rounded once."""
    db32 = None if db is None else db.float()
    torch.ops.fastdpo_cpu.stream_backward(
        *(hidden.contiguous(), weight, targets, logps, lse, grad_logps, *transform, [first for first, _ in tiles]),
        *([part for _, kept in tiles for part in kept], dx, dw, db32, add),
    )
    if db is not None and db32 is not None:
        db.copy_(db32)


def stream_gradient(
    hidden: Tensor,  # bf16 [n, H], H even
    weight: Tensor,  # bf16 or float32 [V, H], dense rows
    bias: Tensor | None,  # [V]
    targets: Tensor,  # int64 [n]; V: on another rank
    logps: Tensor,  # [n], and so are the next four
    lse: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    transform: Transform,
    first: int,
    out: Tensor,  # bf16 [w, n]
) -> None:
    """row_backward's gradient of the w columns from `first` on, from hidden states, transposed."""
    rows = (targets, logps, lse, entropy, grad_logps, grad_entropy)
    torch.ops.fastdpo_cpu.stream_gradient(
        hidden.contiguous(), weight, _float(bias), *rows, *transform, first, first + len(out), out
    )


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


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


def sequence_sums(values: Tensor, bounds: Tensor) -> Tensor:
    return torch.ops.fastdpo_cpu.sequence_sums(values, bounds)


def pair_sigmoid(
    logps: Tensor, bounds: Tensor, ref_logps: Tensor | None, beta: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.fastdpo_cpu.pair_sigmoid(logps, bounds, ref_logps, beta, label_smoothing)
