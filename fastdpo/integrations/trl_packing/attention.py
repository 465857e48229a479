"""What the attention of a model is told about a `Layout`: one form for each kernel.

`segments`, for SDPA: the table of segments goes where the mask goes, and `segment_attention` runs SDPA once a segment.
No mask over the whole row is built, and no token is compared with those of another sequence: the cost is that of
the sequences one by one, less what they share.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .layout import Layout

# SDPA leaves out what a causal mask hides, and nothing of any other mask. So a segment that continues a short one
# attends causally, with idle queries in its parent's place: where they cost less than a mask, as measured on a CPU, up
# to half of the segment's length
_IDLE = 0.5

#: The attention implementation that `register()` gives transformers: SDPA, and segments where a table says so
SEGMENTS = "fastdpo_segments"


def register() -> None:
    """Make SEGMENTS known to transformers, where any model may then choose it; no model changes."""
    AttentionInterface.register(SEGMENTS, segment_attention)
    AttentionMaskInterface.register(SEGMENTS, sdpa_mask)


def segment_table(layout: Layout, window: int | None) -> Tensor:
    """int64 `[1, 1, S, 3]` on the CPU: length, parent and window (0: none) of each segment.

    Four dimensions, which transformers hands through to the attention as they are.
    """
    rows = [(length, parent, window or 0) for length, parent in zip(layout.lengths, layout.parents, strict=True)]
    return torch.tensor(rows)[None, None]


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, segment by segment if attention_mask is a `segment_table`.

    Args:
        query: `[1, heads, N, D]`; key and value: `[1, key heads, N, D]`.
        attention_mask: `segment_table`'s, or whatever transformers' `sdpa_attention_forward` takes.
        The others: as that function.

    Returns:
        (`[1, N, heads, D]`, None)
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
        )
    if keywords.get("position_bias") is not None:
        raise NotImplementedError("position_bias: segments cannot be told of a bias over the whole row")
    table = attention_mask[0, 0].tolist()
    lengths = [length for length, _, _ in table]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    results = []
    for i, (length, parent, window) in enumerate(table):
        q, k, v, before = queries[i], keys[i], values[i], 0
        if parent >= 0:
            before = lengths[parent]
            k, v = torch.cat([keys[parent], k], dim=2), torch.cat([values[parent], v], dim=2)
        mask = None  # causal
        if 0 < window < before + length or before > _IDLE * length:
            mask = _continuation_mask(length, before + length, window, query.device)
        elif before:
            q = F.pad(q, (0, 0, before, 0))
        attended = sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling, **keywords)[0]
        results.append(attended[:, -length:])
    return torch.cat(results, dim=1), None


def _continuation_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """bool `[1, 1, queries, keys]`: causal; the last query stands at the last key."""
    every = torch.ones(queries, keys, dtype=torch.bool, device=device)
    mask = every.tril(keys - queries)
    return (mask.triu(keys - queries - window + 1) if window else mask)[None, None]


def additive_mask(layout: Layout, window: int | None, dtype: torch.dtype) -> Tensor:
    """`[1, 1, N, N]`: 0 where a token is seen, the dtype's minimum where not; for eager attention."""
    every = torch.arange(len(layout.source), device=layout.source.device)
    seen = layout.sees(window)(every[:, None], every[None])
    hidden = torch.tensor(torch.finfo(dtype).min, dtype=dtype, device=seen.device)
    return torch.where(seen, torch.zeros_like(hidden), hidden)[None, None]


def block_mask(layout: Layout, window: int | None) -> Any:
    """`BlockMask` `[1, 1, N, N]` for flex attention; compiled where the kernel is (not on a CPU)."""
    from torch.nn.attention.flex_attention import create_block_mask

    seen, total, device = layout.sees(window), len(layout.source), layout.source.device
    return create_block_mask(
        lambda batch, head, q, k: seen(q, k), 1, None, total, total, device=device, _compile=device.type != "cpu"
    )


def flash_keywords(layout: Layout) -> dict[str, Any]:
    """What FlashAttention needs of a row without parents, by transformers' names: int32 `[S + 1]` and int, twice."""
    ends = torch.tensor([0, *layout.lengths], device=layout.source.device).cumsum(0).to(torch.int32)
    longest = max(layout.lengths)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
