"""The logps that a probe is made of: each model scores the pairs once, into a cache; what is there is looked up."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..cache import BuildReport, CacheError, Entries, ReferenceCache, ReferenceModel
from ..cache.build import untouched_random_state
from ..cache.columns import preparation, speaks
from ..cache.key import as_array
from ..cache.options import BuildOptions
from ..cache.rows import PARTS, Row, load_tokenizer, sequence, vocabulary
from .sampling import Answer

POLICY = "policy"  # its name in a probe's own cache


class Scores(NamedTuple):
    """What one model gives n pairs, over the tokens that it reads."""

    chosen: Entries  # logp float64 [n] (nats, sums over the completion) and counts int32 [n]
    rejected: Entries
    id: str  # of the model as scored: equal ids, equal logps
    same_tokens: bool  # whether these are the policy's tokens
    cut: np.ndarray  # int64 [n]: how many of a pair's completions max_length cuts short
    model: str  # folder or hub id
    dtype: str
    max_length: int | None
    truncation_mode: str

    @property
    def whole(self) -> np.ndarray:
        """bool [n]: pairs of which max_length leaves both completions a token."""
        return (self.chosen.counts > 0) & (self.rejected.counts > 0)

    def only(self, pairs: np.ndarray) -> Scores:
        """Of some pairs, bool [n]."""
        chosen, rejected = (Entries(side.logp[pairs], side.counts[pairs], []) for side in self[:2])
        return self._replace(chosen=chosen, rejected=rejected, cut=self.cut[pairs])


def tokenizer_of(model: str, policy_tokenizer: Any, first: Row, trust_remote_code: bool) -> Any:
    """What a reference is scored through: the policy's tokenizer where the two have the same tokens (as the trainer
    does: chat template and end of text are then the policy's), else its own."""
    own = load_tokenizer(model, first, trust_remote_code)
    return policy_tokenizer if vocabulary(own) == vocabulary(policy_tokenizer) else own


def read(cache: ReferenceCache, name: str, rows: list[Row], policy_tokenizer: Any) -> Scores:
    """Look up what a named model gives the pairs.

    Raises:
        MissingEntry: a row that was never scored under this name.
        CacheError: no such name; it was scored at another temperature than 1; rows that cannot be made into tokens.
    """
    named = cache.reference(name)
    if named.reference.temperature != 1:
        raise CacheError(f"{name}: was scored at temperature {named.reference.temperature:g}, expected 1")
    prepare = preparation(named, rows[0], policy_tokenizer)
    keys, cut = [], np.zeros(len(rows), np.int64)
    for number, row in enumerate(rows):
        prepared = prepare.numbered(row, f"row {number}")
        for part in (0, 1):
            found = sequence(prepared, part, named.max_length, named.truncation_mode, None)
            keys.append(found.key(named.reference))
            cut[number] += len(found.ids) < len(prepared["prompt_ids"]) + len(prepared[f"{PARTS[part]}_ids"])
    places = [f"row {number} {PARTS[part]}" for number in range(len(rows)) for part in (0, 1)]
    entries = cache.lookup(as_array(keys), named, places=places)
    chosen, rejected = (Entries(entries.logp[side::2], entries.counts[side::2], []) for side in (0, 1))
    same = speaks(named, policy_tokenizer)
    reference = named.reference
    return Scores(
        chosen, rejected, reference.id, same, cut, named.model, reference.dtype, named.max_length, named.truncation_mode
    )


def score(
    cache: ReferenceCache, model: ReferenceModel, tokenizer: Any, rows: list[Row], name: str, options: BuildOptions
) -> BuildReport:
    """Score what the cache lacks of the rows: `ReferenceCache.build`, of a model that may be loaded already. The name
    stands for this model from then on."""
    with untouched_random_state():
        return cache.builder(model, tokenizer, rows[0], name, options._replace(replace_name=True)).run(rows)


def score_answers(
    cache: ReferenceCache,
    model: ReferenceModel,
    tokenizer: Any,
    answers: list[Answer],
    name: str,
    options: BuildOptions,
) -> Entries:
    """Score sampled answers, token for token as they were sampled; n entries with token logps."""
    # A row of the cache is a pair: both of its sides are the answer, which is scored once
    rows = [{"prompt_ids": one.prompt_ids, "chosen_ids": one.ids, "rejected_ids": one.ids} for one in answers]
    score(cache, model, tokenizer, rows, name, options._replace(source="sampled answers"))
    named = cache.reference(name)
    keys = [sequence(row, 0, named.max_length, named.truncation_mode, None).key(named.reference) for row in rows]
    return cache.lookup(as_array(keys), named, token_logps=True)
