"""Token logps of the policy, the start model and the reference on held-out pairs: kept per cell, for the token page.

`<id>.tokens.npz` holds, per row i and side s of "chosen", "rejected": `i.s.ids` int64 `[n]`, `i.s.policy`, `i.s.start`
and, where the cell has a reference with the policy's tokenizer, `i.s.reference`, float32 `[n]` each; and `prompts`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..cache import files

SIDES = ("chosen", "rejected")


class TokenSide(NamedTuple):
    """One completion: its tokens as text, and log p of each in nats; lists of one length."""

    tokens: list[str]
    policy: list[float]  # after training
    start: list[float]  # before
    reference: list[float] | None  # None: the cell has none, or one whose tokens are others


class TokenRow(NamedTuple):
    """One held-out pair under one cell's policy."""

    prompt: str
    chosen: TokenSide
    rejected: TokenSide
    beta: float


def save(path: Path, prompts: list[str], sides: list[dict[str, dict[str, np.ndarray]]]) -> None:
    """Write the arrays, whole or not at all.

    Args:
        prompts: one a row.
        sides: one a row: side -> name (ids, policy, start, perhaps reference) -> `[n]`.
    """
    arrays: dict[str, Any] = {
        f"{i}.{side}.{name}": values
        for i, row in enumerate(sides)
        for side, named in row.items()
        for name, values in named.items()
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, prompts=np.array(prompts, np.str_), **arrays)
    files.write(path, buffer.getvalue())


def load(path: Path, tokenizer: Any, beta: float) -> list[TokenRow]:
    """The rows of a file that `save` wrote, with each token as the tokenizer writes it."""
    rows = []
    with np.load(path, allow_pickle=False) as arrays:
        for i, prompt in enumerate(arrays["prompts"]):
            chosen, rejected = (_side(arrays, f"{i}.{side}.", tokenizer) for side in SIDES)
            rows.append(TokenRow(str(prompt), chosen, rejected, beta))
    return rows


def _side(arrays: Any, prefix: str, tokenizer: Any) -> TokenSide:
    ids = arrays[f"{prefix}ids"].tolist()
    reference = arrays[f"{prefix}reference"].tolist() if f"{prefix}reference" in arrays else None
    texts = _texts(ids, tokenizer)
    return TokenSide(texts, arrays[f"{prefix}policy"].tolist(), arrays[f"{prefix}start"].tolist(), reference)


def _texts(ids: list[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text: byte pairs that are only part of a character show at its last token."""
    texts = []
    before, shown = 0, 0  # what was shown last is ids[before:shown]; a token may be written otherwise at a beginning
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[before:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(tokenizer.decode(ids[before:shown])) :])
        before, shown = shown, end
    return texts
