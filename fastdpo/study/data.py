"""A study's pairs: those it trains on and those it holds out, and no prompt in both."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

from ..train_data import DataError, read_pairs
from .config import Data
from .errors import StudyError


class Pairs(NamedTuple):
    """`datasets.Dataset`s with prompt, chosen and rejected."""

    train: Any
    held_out: Any


def read(data: Data) -> Pairs:
    """The pairs of a study's files, split as it says.

    Raises:
        StudyError: files that are none of pairs, a prompt in both, or nothing left on one side.
    """
    try:
        train = _with_prompts(read_pairs(data.train))
        held_out = None if data.held_out is None else _with_prompts(read_pairs(data.held_out))
    except DataError as error:
        raise StudyError(f"data: {error}") from None
    if held_out is None:
        chosen = [_drawn(row, data) for row in train]
        held_out = train.select([i for i, out in enumerate(chosen) if out])
        train = train.select([i for i, out in enumerate(chosen) if not out])
    if data.train_rows is not None:
        train = train.select(range(min(data.train_rows, len(train))))
    if data.held_out_rows is not None:
        held_out = held_out.select(range(min(data.held_out_rows, len(held_out))))
    for name, rows in (("train", train), ("held out", held_out)):
        if len(rows) < 2:
            raise StudyError(f"data: {len(rows)} pairs to {name}, expected at least 2")
    known = {_key(row) for row in train}
    both = [i for i, row in enumerate(held_out) if _key(row) in known]
    if both:
        raise StudyError(
            f"data.held_out: the prompts of {len(both)} of its {len(held_out)} pairs are in data.train too, the first "
            f"of row {both[0]}; expected none"
        )
    return Pairs(train, held_out)


def fingerprint(pairs: Pairs) -> str:
    """A hash of all rows, 32 hex digits."""
    whole = hashlib.blake2b(digest_size=16)
    for rows in pairs:
        for row in rows:
            whole.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        whole.update(b"\f")
    return whole.hexdigest()


def _with_prompts(rows: Any) -> Any:
    """The shared beginning of chosen and rejected as `prompt`, where there is none; as TRL does."""
    from trl.data_utils import extract_prompt

    return rows if "prompt" in rows.column_names else rows.map(extract_prompt)


def _key(row: dict[str, Any]) -> bytes:
    return json.dumps(row["prompt"], sort_keys=True).encode()


def _drawn(row: dict[str, Any], data: Data) -> bool:
    """Whether a row is held out: by its prompt alone, so that all rows of one prompt are on one side."""
    drawn = hashlib.blake2b(_key(row), digest_size=8, salt=data.seed.to_bytes(8, "little")).digest()
    return int.from_bytes(drawn, "big") / 2**64 < (data.held_out_share or 0)
