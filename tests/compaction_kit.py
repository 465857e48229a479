"""What the tests of compaction and of the streamed head share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdpo import TokenLogps, compaction, linear_token_logps, saved, tiles

TOL = 2.0**-10


@pytest.fixture
def tokens(backend: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Two tiles and a bit; small ones under Triton's interpreter, which is slow."""
    if backend == "triton":
        monkeypatch.setattr(tiles, "_COMPACT_TOKENS", 16)
        return 40
    return 600


def gradients(hidden: Tensor, weight: Tensor, labels: Tensor, g: Tensor, **keywords) -> tuple[Tensor, ...]:
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_token_logps(h, w, labels, stats=("dropped_mass",), **keywords)
    out.logps.backward(g.to(out.logps.dtype))
    return out.logps.detach(), out.dropped_mass, h.grad, w.grad


def kept(out: TokenLogps) -> list[str | None]:
    """What each tile of a forward keeps for its backward, by the name of its class; None: nothing of its own."""
    _, layout = out.logps.grad_fn.saved_layout
    return [None if kind is None else saved._KINDS[kind].__name__ for *_, kind in layout]


def filled(kept: compaction.Sparse) -> compaction.Compact:
    """With P whole, zeros where it has no entry."""
    columns = torch.repeat_interleave(torch.arange(len(kept.columns)), kept.starts.diff())
    probs = torch.zeros(len(kept.columns), len(kept.dropped), dtype=torch.bfloat16)
    probs[columns, kept.entries >> 16 & 0xFFFF] = kept.entries.short().view(torch.bfloat16)
    return compaction.Compact(kept.columns, probs, kept.dropped, kept.mean_row)
