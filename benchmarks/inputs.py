"""The batch of a case: shapes of a real head, random states whose softmax is peaked as a trained model's, or not."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.bench.from_logits import LogitsBatch
from fastdpo.bench.inputs import random_batch
from fastdpo.bench.providers import Batch

from .cases import Case, Shape

SEQUENCES = 4  # two pairs


def make(case: Case, shape: Shape) -> Batch | LogitsBatch:
    """The same for the same case and shape."""
    generator = torch.Generator().manual_seed(1)
    dtype = getattr(torch, case.dtype)
    lengths, counts = layout(case, shape.tokens, generator)
    if case.entry == "hidden":
        batch = random_batch(case.softmax, shape.tokens, shape.vocab, shape.width, dtype)
        return batch._replace(labels=batch.labels.masked_fill(~counts, -100), lengths=lengths)
    logits = torch.randn((shape.tokens, shape.vocab), generator=generator, dtype=dtype).mul_(3)
    labels = torch.randint(0, shape.vocab, (shape.tokens,), generator=generator)
    grads = torch.randn(shape.tokens, generator=generator)
    return LogitsBatch(logits, labels.masked_fill(~counts, -100), lengths, grads)


def layout(case: Case, tokens: int, generator: torch.Generator) -> tuple[tuple[int, ...], Tensor]:
    """Lengths of the sequences `[2B]`, and which of the N positions count.

    Packed: completions of unlike lengths. Padded: `[2B, T]`, half of it prompt, then T/4 to T/2 of completion, padding.
    """
    if case.layout == "packed":
        parts = torch.rand(SEQUENCES, generator=generator) * 0.6 + 0.7
        lengths = [int(part) for part in parts / parts.sum() * tokens]
        lengths[0] += tokens - sum(lengths)
        return tuple(lengths), torch.ones(tokens, dtype=torch.bool)
    longest = tokens // SEQUENCES
    ends = torch.randint(longest * 3 // 4, longest + 1, (SEQUENCES,), generator=generator)
    place = torch.arange(longest)
    return (longest,) * SEQUENCES, ((place >= longest // 2) & (place < ends[:, None])).flatten()
