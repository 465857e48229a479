"""Inputs of a case, made: no model is needed. Hidden states whose softmax is peaked like a trained model's, or is not.

Peaked: each token has CANDIDATES next tokens, drawn from Zipf's law, with probabilities that fall as rank ** -1.5; its
hidden state is the sum of their rows of the head that gives them these logits, and its label is drawn from them. The
height of the peak is found by bisection: the 4% of the columns that hold most of a tile of 256 tokens hold all but a
thousandth (Gemma 3 270M on real pairs: 0.08%). A small vocabulary may not reach that: it is less sparse, as it is in a
real head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdpo.bench.from_logits import LogitsBatch
from fastdpo.bench.providers import Batch

from .cases import Case, Shape

CANDIDATES, FALL = 8, 1.5
TILE, TOP, OUTSIDE = 256, 0.04, 1e-3
SEQUENCES = 4  # two pairs
HIGHEST = 64.0  # logit of a first candidate


def make(case: Case, shape: Shape) -> Batch | LogitsBatch:
    """The batch of a case; the same for the same shape."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    lengths, counts = layout(case, shape.tokens, generator)
    grads = torch.randn(shape.tokens, generator=generator)
    if case.entry == "logits":
        logits = torch.randn((shape.tokens, shape.vocab), generator=generator, dtype=dtype).mul_(3)
        labels = torch.randint(0, shape.vocab, (shape.tokens,), generator=generator)
        return LogitsBatch(logits, labels.masked_fill(~counts, -100), lengths, grads)
    weight = head(shape.vocab, shape.width, dtype, generator)
    if case.softmax == "dense":
        hidden = torch.randn((shape.tokens, shape.width), generator=generator, dtype=dtype)
        labels = torch.randint(0, shape.vocab, (shape.tokens,), generator=generator)
    else:
        ids, directions = candidates(weight, shape.tokens, generator)
        height = peak(weight)
        hidden = states(directions, height).to(dtype)
        chosen = torch.multinomial(probabilities().expand(shape.tokens, -1), 1, generator=generator)
        labels = ids.gather(1, chosen).squeeze(1)
    return Batch(hidden, weight, labels.masked_fill(~counts, -100), lengths, grads)


def layout(case: Case, tokens: int, generator: torch.Generator) -> tuple[tuple[int, ...], Tensor]:
    """Lengths of the sequences, and which of the N positions count.

    Packed: completions of unlike lengths. Padded: `[2B, T]`, T/2 of prompt, then T/4 to T/2 of completion, then padding.
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


def head(vocab: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """`[V, H]`, rows of length about 1."""
    return torch.randn((vocab, width), generator=generator, dtype=dtype).mul_(width**-0.5)


def dense_batch(like: Batch) -> Batch:
    """Random hidden and weight, whose softmax is not sparse; its shapes, dtype, labels and lengths."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(like.hidden.shape, generator=generator).to(like.hidden.dtype)
    weight = head(*like.weight.shape, torch.float32, generator).to(like.weight.dtype)
    return like._replace(hidden=hidden, weight=weight, grads=torch.randn(len(like.labels), generator=generator))


def candidates(weight: Tensor, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids `[N, CANDIDATES]`, by Zipf's law and distinct for a token, and their rows of the head, float32."""
    each = len(weight) // CANDIDATES
    # By inversion: a rank is log-uniform. Every place among the candidates has its own part of the vocabulary
    ranks = torch.rand((tokens, CANDIDATES), generator=generator).mul(math.log(each)).exp().long().clamp(1, each) - 1
    ids = ranks * CANDIDATES + torch.arange(CANDIDATES)
    return ids, weight[ids].float()


def probabilities() -> Tensor:
    """Of the candidates, by rank."""
    return torch.softmax(-FALL * torch.arange(1, CANDIDATES + 1).log(), 0)


def states(directions: Tensor, height: float) -> Tensor:
    """Hidden `[N, H]` that gives the first candidate a logit of about `height`, the others theirs."""
    logits = height - FALL * torch.arange(1, CANDIDATES + 1).log()
    return torch.einsum("nkh,k->nh", directions, logits)


def peak(weight: Tensor) -> float:
    """The height at which a tile's softmax is as sparse as a trained model's."""
    _, directions = candidates(weight, TILE, torch.Generator().manual_seed(1))
    # Logits are linear in the height
    level, slope = (states(directions, h).to(weight.dtype) @ weight.T for h in (0.0, 1.0))
    slope -= level
    low, high = 8.0, HIGHEST
    for _ in range(7):
        middle = (low + high) / 2
        logits = torch.add(level.float(), slope.float(), alpha=middle)
        low, high = (middle, high) if outside(logits) > OUTSIDE else (low, middle)
    return high


def outside(logits: Tensor) -> float:
    """Mean probability outside the columns that hold the most of a tile; overwrites logits `[n, V]`."""
    logits -= logits.logsumexp(-1, keepdim=True)
    mass = logits.exp_().sum(0)
    return 1 - mass.topk(max(1, int(TOP * len(mass)))).values.sum().item() / len(logits)
