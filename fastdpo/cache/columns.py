"""Reference logps as columns of a data set: what TRL's collator and trainer read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from . import rows as rows_
from .build import Builder, untouched_random_state
from .errors import CacheError
from .key import KEY_BYTES, as_array
from .lookup import Entries
from .manifest import NamedReference
from .model import ReferenceModel
from .options import BuildOptions
from .record import Record
from .rows import PARTS, Preparation, Row, sequence

CHOSEN, REJECTED = "ref_chosen_logps", "ref_rejected_logps"  # as TRL 1.16 calls them
BATCH = 1000  # rows prepared at once, and of a stream looked up
BATCH_OF_KEYS = 1 << 16  # rows of a data set looked up at once: each shard is read that seldom for token logps
AS_BUILT: Any = "as built"
MODEL_KEYWORDS = {"dtype", "autocast", "temperature", "device", "backend", "revision", "trust_remote_code"}


class Cache(Protocol):
    """What is asked of a `ReferenceCache`, which for its part asks for columns."""

    @property
    def references(self) -> dict[str, NamedReference]: ...

    def reference(self, name: str | None = None) -> NamedReference: ...

    def builder(
        self, model: ReferenceModel, tokenizer: Any, first: Row, name: str, options: BuildOptions
    ) -> Builder: ...

    def lookup(
        self,
        keys: np.ndarray,
        reference: str | NamedReference | None = None,
        *,
        places: SequenceOf[str] | None = None,
        token_logps: bool = False,
    ) -> Entries: ...


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
        cache: Cache,
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
        self.compute(rows)
        return self.look_up(self.keys(rows, numbers), numbers)

    def compute(self, rows: Any) -> None:
        """Score what is missing of rows, where there is a builder."""
        if self._builder is not None:
            with untouched_random_state():
                self._builder.run(rows)

    def keys(self, rows: list[Row], numbers: list[int]) -> list[bytes]:
        """Of each row those of its parts."""
        named, keys = self._named, []
        for row, number in zip(rows, numbers, strict=True):
            prepared = self._prepare.numbered(row, f"row {number}")
            for part in self._parts:
                found = sequence(prepared, part, named.max_length, named.truncation_mode, named.prior_prefix)
                keys.append(found.key(named.reference))
        return keys

    def look_up(self, keys: list[bytes], numbers: list[int]) -> dict[str, list[Any]]:
        """column -> one value a row, of what `keys` gave for them."""
        n, width = len(numbers), len(self._parts)
        by_part = as_array(keys).reshape(n, width, KEY_BYTES).swapaxes(0, 1).reshape(n * width, KEY_BYTES)
        places = _Places(self._parts, numbers)
        tokens_too = self._token_logps or self._ld_alpha is not None
        found = self._cache.lookup(by_part, self._named, places=places, token_logps=tokens_too)
        self._say_empty(int((found.counts[: 2 * n] == 0).sum()), 2 * n)
        columns: dict[str, list[Any]] = {}
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

    def _say_empty(self, empty: int, asked: int) -> None:
        if empty:
            warnings.warn(
                f"{empty} of {asked} completions have no token within max_length {self._named.max_length}: logp 0",
                stacklevel=2,
            )

    def record(self) -> Record:
        """What the columns are, to go with the data."""
        named = self._named
        return Record(
            named.reference.id, named.reference.temperature, named.max_length, named.truncation_mode, self._ld_alpha
        )

    def of_batch(self, batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        """The same for `datasets`' batches: a dict of columns."""
        names = list(batch)
        return self([dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)], numbers)


def _shortened(logps: np.ndarray, shared: int, alpha: float) -> float:
    return float(logps[:shared].sum(dtype=np.float64) + alpha * logps[shared:].sum(dtype=np.float64))


def add(dataset: Any, rows: Any, columns: Columns) -> Any:
    """A list of rows, a `Dataset` or an `IterableDataset` (looked up as it is read) with the columns.

    Args:
        rows: of the data set, without its format.
    """
    if isinstance(dataset, list):
        found = columns(dataset, list(range(len(dataset))))
        return [{**row, **{name: values[i] for name, values in found.items()}} for i, row in enumerate(dataset)]
    from datasets import Dataset, IterableDataset, concatenate_datasets

    if isinstance(dataset, IterableDataset):
        return rows.map(columns.of_batch, batched=True, batch_size=BATCH, with_indices=True)
    if not isinstance(dataset, Dataset):
        raise CacheError(f"dataset: expected a Dataset, IterableDataset or list of rows, got {type(dataset).__name__}")
    columns.compute(rows)
    values: dict[str, list[Any]] = {}
    for first in range(0, len(dataset), BATCH_OF_KEYS):
        numbers = list(range(first, min(first + BATCH_OF_KEYS, len(dataset))))
        keys: list[bytes] = []
        for start in range(0, len(numbers), BATCH):
            batch = numbers[start : start + BATCH]
            keys += columns.keys([rows[i] for i in batch], batch)
        for name, column in columns.look_up(keys, numbers).items():
            values.setdefault(name, []).extend(column)
    old = [name for name in values if name in dataset.column_names]
    whole = concatenate_datasets([rows.remove_columns(old), Dataset.from_dict(values)], axis=1)
    whole.info.description = columns.record().beside(dataset.info.description or "")
    form = dataset.format
    hidden = set(dataset.column_names) - set(form["columns"])
    shown = [name for name in whole.column_names if name not in hidden]
    whole.set_format(form["type"], shown if hidden else None, form["output_all_columns"], **form["format_kwargs"])
    return whole


class _Places(SequenceOf[str]):
    """ "row 3 chosen", ...: what to call each key of a look-up, made only where an error asks."""

    def __init__(self, parts: list[int], numbers: list[int]) -> None:
        self._parts, self._numbers = parts, numbers

    def __len__(self) -> int:
        return len(self._parts) * len(self._numbers)

    def __getitem__(self, i: Any) -> Any:
        part, row = divmod(int(i), len(self._numbers))
        return f"row {self._numbers[row]} {PARTS[self._parts[part]]}"


class Asked(NamedTuple):
    """Keywords of `ReferenceCache.attach`, where they are explained."""

    tokenizer: Any
    max_length: int | None
    truncation_mode: str
    prior: bool
    token_logps: bool
    ld_alpha: float | None
    on_miss: str
    model: Any


def resolve(
    cache: Cache, reference: str | None, first: Row, asked: Asked, build_keywords: dict[str, Any]
) -> tuple[NamedReference, Builder | None]:
    """(the reference with the max_length and truncation_mode to use; what computes missing entries, if asked to)

    Raises:
        CacheError: arguments that contradict one another, or the cache.
    """
    if asked.on_miss not in ("raise", "compute"):
        raise CacheError(f"on_miss: expected 'raise' or 'compute', got {asked.on_miss!r}")
    compute = asked.on_miss == "compute"
    if compute != (asked.model is not None):
        raise CacheError(f"model: expected {'one' if compute else 'none'} with on_miss={asked.on_miss!r}")
    known_keywords = {*MODEL_KEYWORDS, *BuildOptions._fields} if compute else set()
    for name in build_keywords:
        if name not in known_keywords:
            raise CacheError(f"{name}: not a keyword of attach with on_miss={asked.on_miss!r}")
    if compute and asked.tokenizer is None and not rows_.tokenized(first):
        raise CacheError("tokenizer: expected the reference's with on_miss='compute'")
    known = cache.references
    new = compute and (reference not in known if reference else not known)
    built: Any = BuildOptions() if new else cache.reference(reference)
    max_length = built.max_length if asked.max_length is AS_BUILT else asked.max_length
    truncation_mode = built.truncation_mode if asked.truncation_mode is AS_BUILT else asked.truncation_mode
    rows_.check_truncation(max_length, truncation_mode)
    builder = None
    if compute:
        model_keywords = {k: v for k, v in build_keywords.items() if k in MODEL_KEYWORDS}
        others = {k: v for k, v in build_keywords.items() if k not in MODEL_KEYWORDS}
        tokens_too = asked.token_logps or asked.ld_alpha is not None
        options = BuildOptions(max_length, truncation_mode, asked.prior, tokens_too, **others)
        name = reference or ("reference" if new else built.name)
        with untouched_random_state():
            builder = cache.builder(
                ReferenceModel(asked.model, **model_keywords), asked.tokenizer, first, name, options
            )
        named = builder.named
    else:
        named = replace(built, max_length=max_length, truncation_mode=truncation_mode)
    if asked.prior and named.prior_prefix is None:
        raise CacheError(f"prior: reference {named.name!r} was built without a tokenizer, so without priors")
    return named, builder


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
