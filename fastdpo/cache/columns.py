"""Reference logps as columns of a data set: what TRL's collator and trainer read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import rows as rows_
from .build import Builder, untouched_random_state
from .errors import CacheError
from .key import as_array
from .manifest import NamedReference
from .rows import PARTS, Preparation, Row, sequence

if TYPE_CHECKING:
    from .store import ReferenceCache

CHOSEN, REJECTED = "ref_chosen_logps", "ref_rejected_logps"  # as TRL 1.16 calls them
BATCH = 1000  # rows looked up at once


class Columns:
    """Rows to their columns of logps. Can be pickled, so data workers can hold it.

    Args:
        named: the reference, with the max_length and truncation_mode to use.
        prepare: rows to tokens.
        parts: indices into rows.PARTS.
        ld_alpha: LD-DPO (arXiv 2409.06411): weight of the tokens beyond the shorter completion of the pair.
        token_logps: the logps of single tokens too.
        builder: scores what is missing of the rows before they are looked up.
    """

    def __init__(
        self,
        cache: ReferenceCache,
        named: NamedReference,
        prepare: Preparation,
        parts: list[int],
        ld_alpha: float | None = None,
        token_logps: bool = False,
        builder: Builder | None = None,
    ) -> None:
        self._cache, self._named, self._prepare, self._parts = cache, named, prepare, parts
        self._ld_alpha, self._token_logps, self._builder = ld_alpha, token_logps, builder

    def __call__(self, rows: list[Row], numbers: list[int]) -> dict[str, list[Any]]:
        """column -> one value a row. `numbers`: of the rows, for messages.

        Raises:
            MissingEntry: a row that is not in the cache.
        """
        if self._builder is not None:
            with untouched_random_state():
                self._builder.run(rows)
        named, prepared = self._named, [self._prepare(row) for row in rows]
        keys = [
            sequence(row, part, named.max_length, named.truncation_mode, named.prior_prefix).key(named.reference)
            for part in self._parts
            for row in prepared
        ]
        places = [f"row {number} {PARTS[part]}" for part in self._parts for number in numbers]
        tokens_too = self._token_logps or self._ld_alpha is not None
        found = self._cache.lookup(as_array(keys), named, places=places, token_logps=tokens_too)
        n, columns = len(rows), {}
        for i, part in enumerate(self._parts):
            name = f"ref_{PARTS[part].replace(' ', '_')}_logps"
            columns[name] = found.logp[i * n : (i + 1) * n].tolist()
            if self._token_logps:
                columns[name.replace("logps", "token_logps")] = found.token_logps[i * n : (i + 1) * n]
        if self._ld_alpha is not None:
            chosen, rejected = found.token_logps[:n], found.token_logps[n : 2 * n]
            columns[CHOSEN], columns[REJECTED] = (
                [
                    _shortened(mine, min(len(a), len(b)), self._ld_alpha)
                    for mine, a, b in zip(side, chosen, rejected, strict=True)
                ]
                for side in (chosen, rejected)
            )
        return columns

    def of_batch(self, batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        """The same for `datasets`' batches: a dict of columns."""
        names = list(batch)
        return self([dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)], numbers)


def _shortened(logps: np.ndarray, shared: int, alpha: float) -> float:
    return float(logps[:shared].sum(dtype=np.float64) + alpha * logps[shared:].sum(dtype=np.float64))


def add(dataset: Any, columns: Columns) -> Any:
    """A list of rows, a `Dataset` or an `IterableDataset` (looked up as it is read) with the columns."""
    if isinstance(dataset, list):
        found = columns(dataset, list(range(len(dataset))))
        return [{**row, **{name: values[i] for name, values in found.items()}} for i, row in enumerate(dataset)]
    from datasets import Dataset, IterableDataset, concatenate_datasets

    if isinstance(dataset, IterableDataset):
        return dataset.map(columns.of_batch, batched=True, batch_size=BATCH, with_indices=True)
    if not isinstance(dataset, Dataset):
        raise CacheError(f"dataset: expected a Dataset, IterableDataset or list of rows, got {type(dataset).__name__}")
    plain = dataset.with_format(None)
    values: dict[str, list[Any]] = {}
    for first in range(0, len(dataset), BATCH):
        numbers = range(first, min(first + BATCH, len(dataset)))
        for name, column in columns([plain[i] for i in numbers], list(numbers)).items():
            values.setdefault(name, []).extend(column)
    old = [name for name in values if name in dataset.column_names]
    return concatenate_datasets([dataset.remove_columns(old), Dataset.from_dict(values)], axis=1)


def speaks(named: NamedReference, tokenizer: Any) -> bool:
    """Whether a reference reads the tokens of this tokenizer."""
    return named.vocabulary in (None, rows_.vocabulary(tokenizer))


def preparation(named: NamedReference, first: Row, tokenizer: Any) -> Preparation:
    """How rows become the tokens of a reference, which may have another tokenizer than the policy's.

    Args:
        first: the first row.
        tokenizer: the policy's; None: the reference's own.

    Raises:
        CacheError: the reference has another tokenizer, and that is not to be found, or the rows have lost their text.
    """
    tokenized = rows_.tokenized(first)
    if tokenizer is None and tokenized:
        return Preparation(first, None)
    if tokenizer is not None and speaks(named, tokenizer):
        return Preparation(first, tokenizer)
    if tokenized:
        raise CacheError(
            f"dataset: holds the tokens of another tokenizer than reference {named.name!r} ({named.tokenizer}); "
            "attach to the text, before it is tokenized"
        )
    own = rows_.load_tokenizer(named.tokenizer, first)
    if named.vocabulary != rows_.vocabulary(own):
        raise CacheError(
            f"tokenizer: {named.tokenizer} is not the one that reference {named.name!r} was built with any more; "
            "pass that one as tokenizer="
        )
    return Preparation(first, own)
