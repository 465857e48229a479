"""A padded batch of TRL's collator as one row without padding, and back.

Padding-free, the sequences stand one after the other. With shared prompts (arXiv 2410.20305), what chosen and rejected
begin with stands there once, and both continue it:

    chosen    p q r a b c          the row   p q | r a b c | r d e
    rejected  p q r d e            position  0 1   2 3 4 5   2 3 4

The last common token heads both continuations: what follows it differs, and so each position has one target, as
everywhere else. The hidden states are those of the two sequences, and the gradients their sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which token stands where. The row consists of segments, each causal in itself.

    Attributes:
        source: int64 `[N]`, where each token of the row stands in the flattened padded batch `[R * T]`.
        place: int64 `[R, T]`, where each token of the padded batch stands in the row; N for padding.
        lengths: of the segments, in order; they sum to N.
        parents: of each segment, the number of the segment that it continues, or -1.
    """

    source: Tensor
    place: Tensor
    lengths: list[int]
    parents: list[int]

    @property
    def position_ids(self) -> Tensor:
        """int64 `[1, N]`: the position of each token in its own sequence."""
        return (self.source % self.place.shape[1])[None]

    def pack(self, padded: Tensor) -> Tensor:
        """`[R, T]` -> `[1, N]`."""
        return padded.flatten()[self.source][None]

    def unpack(self, row: Tensor) -> Tensor:
        """`[1, N, ...]` -> `[R, T, ...]`, 0 for padding. A common token goes to both rows."""
        return torch.cat([row[0], row.new_zeros(1, *row.shape[2:])])[self.place]

    def sees(self, window: int | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """The attention mask, as a function of indices into the row: (queries, keys) -> bool, broadcast.

        Args:
            window: of sliding-window attention, counted in positions of the sequence; None: everything before.
        """
        device, total = self.source.device, len(self.source)
        counts = torch.tensor(self.lengths, device=device)
        segment = torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=total)
        parent = torch.tensor(self.parents, device=device)[segment]
        position = self.position_ids[0]

        def seen(queries: Tensor, keys: Tensor) -> Tensor:
            distance = position[queries] - position[keys]
            near = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
            return near & ((segment[keys] == segment[queries]) | (segment[keys] == parent[queries]))

        return seen


def layout(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, shared_prompt: bool) -> Layout:
    """The layout of one padded batch.

    Args:
        input_ids: int64 `[R, T]`, padded on the right; with shared_prompt a pair batch.
        attention_mask: `[R, T]`, 1 for a token and 0 for padding.
        labels: int64 `[R, T]`, -100 where a token is no target.
        shared_prompt: put once what both rows of a pair begin with. That is as far as tokens and labels agree, however
            the collator cut them; a pair that has nothing in common becomes two sequences.

    Raises:
        ValueError: rows padded on the left or with gaps, or without a token; shared_prompt with an odd number of rows.
    """
    rows, width = input_ids.shape
    real = attention_mask != 0
    if (real[:, 1:] > real[:, :-1]).any():
        raise ValueError("attention_mask: expected rows padded on the right, as TRL's collator makes them")
    lengths = real.sum(1).tolist()
    if not any(lengths):
        raise ValueError("attention_mask: expected at least one token in the batch, got padding alone")
    groups: list[tuple[int, ...]]
    if shared_prompt:
        if rows % 2:
            raise ValueError(f"input_ids: expected chosen rows and as many rejected rows, got {rows} rows")
        half = rows // 2
        agree = (input_ids[:half] == input_ids[half:]) & (labels[:half] == labels[half:]) & real[:half] & real[half:]
        common = agree.long().cumprod(1).sum(1).tolist()
        groups = [(pair, pair + half) for pair in range(half)]
    else:
        common = [0] * rows
        groups = [(row,) for row in range(rows)]

    spans: list[tuple[int, int, int]] = []  # row, start, stop
    parents: list[int] = []
    for group, same in zip(groups, common, strict=True):
        start = max(same - 1, 0)  # the last common token heads the continuations
        parent = len(spans) if start else -1
        if start:
            spans.append((group[0], 0, start))
            parents.append(-1)
        for row in group:
            if start < lengths[row]:
                spans.append((row, start, lengths[row]))
                parents.append(parent)

    source = torch.cat([torch.arange(row * width + start, row * width + stop) for row, start, stop in spans])
    place = torch.full((rows, width), len(source))
    place.view(-1)[source] = torch.arange(len(source))
    for group, same in zip(groups, common, strict=True):
        for row in group[1:]:
            place[row, : max(same - 1, 0)] = place[group[0], : max(same - 1, 0)]
    device = input_ids.device
    return Layout(source.to(device), place.to(device), [stop - start for _, start, stop in spans], parents)
