"""`ReferenceCache`: one folder of reference logps, for whoever builds, reads or keeps it."""

from __future__ import annotations

import os
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import numpy as np

from . import claims, columns, garbage, rows, upkeep
from . import verify as verify_
from .build import Builder, untouched_random_state
from .columns import AS_BUILT
from .errors import CacheError
from .index import Index
from .key import KEY_BYTES
from .lookup import Entries, look_up
from .manifest import Manifest, NamedReference, check_name
from .model import ReferenceModel
from .options import BuildOptions, BuildReport
from .rows import MAX_LENGTH, Preparation, Row


class ReferenceCache:
    """Reference logps, computed once and kept: `build` them, then `attach` them to a data set or train with them.

        cache = ReferenceCache("refs")
        cache.build("org/model", tokenizer, pairs)
        trainer = FastDPOTrainer(model, args=args, train_dataset=pairs, reference_cache=cache)

    Args:
        path: the folder. The first build makes it.

    Raises:
        CacheError: the folder holds a later version of this, something else under its names, or a link out of it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._manifest = Manifest(self.path)
        self._manifest.check()
        self._indexes: dict[str, Index] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return ReferenceCache, (self.path,)

    def __repr__(self) -> str:
        return f"ReferenceCache({str(self.path)!r})"

    @property
    def references(self) -> dict[str, NamedReference]:
        """name -> what it is."""
        return self._manifest.all()

    def reference(self, name: str | None = None) -> NamedReference:
        """A reference by name; None: the only one.

        Raises:
            CacheError: no such name, or None and not exactly one.
        """
        self._manifest.require()
        if name is None:
            names = list(self.references)
            if len(names) != 1:
                raise CacheError(f"reference: expected a name of {self.path}, which holds {', '.join(names) or 'none'}")
            name = names[0]
        return self._manifest.get(name)

    # --- build -------------------------------------------------------------------------------------------------------

    def build(
        self,
        model: Any,
        tokenizer: Any,
        data: Any,
        *,
        name: str = "reference",
        max_length: int | None = MAX_LENGTH,
        truncation_mode: str = "keep_start",
        prior: bool = False,
        token_logps: bool = False,
        shard_size: int = 512,
        batch_tokens: int = 8192,
        source: str = "data",
        replace_name: bool = False,
        progress: bool = True,
        **model_keywords: Any,
    ) -> BuildReport:
        """Score what `data` needs and the folder does not hold. Can be killed and run again, and run several times at
        once, here and on other machines: the work is shared.

        Args:
            model: the reference: a loaded model, or a folder or hub id, loaded only if something has to be scored.
            tokenizer: the reference's own, or a processor; None for data with prompt_ids, chosen_ids, rejected_ids.
            data: TRL's preference columns, as text, messages or tokens: a .jsonl file, a `Dataset`, a list of rows, or
                any iterable of rows (an `IterableDataset`), which is read in windows of 8192.
            name: of the reference in this cache.
            max_length, truncation_mode: as the trainer's DPOConfig; here its defaults.
            prior: the unconditional logps of the completions too: given the beginning of text alone (the end of text,
                where the tokenizer has no beginning).
            token_logps: keep the logps of single tokens too (LD-DPO needs them).
            shard_size: sequences in a shard, at most: what a kill loses.
            batch_tokens: tokens in a forward, padding included, at most, unless one sequence has more.
            source: the data's name, for messages.
            replace_name: let `name` stand for another reference than before.
            progress: show a bar with rate and time left.
            model_keywords: `dtype`, `autocast`, `temperature`, `device`, `backend`, `revision`, `trust_remote_code`,
                as `ReferenceModel` takes them.

        Raises:
            CacheError: bad arguments; `name` taken by another reference; a model that changed after it was
                fingerprinted, or whose files are damaged; rows that cannot be made into tokens or that the model cannot
                score; rows without a finite logp (all others are scored first).
            ValueError: bad `temperature` or `backend`; a .jsonl file that is not one of pairs.
            OSError: files that cannot be read or written; no such model.
        """
        options = BuildOptions(
            max_length, truncation_mode, prior, token_logps, shard_size, batch_tokens, source, replace_name, progress
        )
        with untouched_random_state():
            first, every = rows.peek(data)
            builder = self.builder(ReferenceModel(model, **model_keywords), tokenizer, first, name, options)
            report = builder.run(every)
        self.index(builder.named).refresh()  # whoever reads next finds an index file, if it is worth one
        return report

    def builder(self, model: ReferenceModel, tokenizer: Any, first: Row, name: str, options: BuildOptions) -> Builder:
        """What `build` runs: the arguments checked, the reference named, damage taken out of use.

        Args:
            first: the first row.
        """
        self._manifest.check()
        options.check()
        check_name(name)
        prefix = None if tokenizer is None else rows.prior_prefix(tokenizer)
        if options.prior and prefix is None:
            raise CacheError("prior: needs a tokenizer with a beginning or an end of text, for the empty prompt")
        prepare = Preparation(first, tokenizer)
        named = NamedReference(
            name=name,
            reference=model.reference,
            model=model.name,
            tokenizer=rows.origin(tokenizer),
            vocabulary=None if tokenizer is None else rows.vocabulary(tokenizer),
            prior_prefix=prefix,
            max_length=options.max_length,
            truncation_mode=options.truncation_mode,
            prior=options.prior,
            token_logps=options.token_logps,
        )
        with claims.at_work(self.path):
            self._manifest.create()
            named = self._manifest.put(named, options.replace_name)
            index = upkeep.repair(self.path, named.reference)
        return Builder(self.path, index, model, named, prepare, options)

    # --- read --------------------------------------------------------------------------------------------------------

    def shards(self, named: NamedReference) -> Path:
        """The folder of a reference's shards."""
        return upkeep.shards_of(self.path, named.reference)

    def index(self, named: NamedReference) -> Index:
        """Its entries, as far as they were there when it was last refreshed."""
        reference = named.reference.id
        if reference not in self._indexes:
            self._indexes[reference] = Index(
                self.shards(named), self.path / "index" / reference, reference, named.reference.rounding
            )
            self._indexes[reference].refresh()
        return self._indexes[reference]

    def lookup(
        self,
        keys: np.ndarray,
        reference: str | NamedReference | None = None,
        *,
        places: SequenceOf[str] | None = None,
        token_logps: bool = False,
    ) -> Entries:
        """The entries of many keys at once.

        Args:
            keys: uint8 `[n, 16]`, as `Sequence.key` gives them.
            reference: name, or what `reference()` gave; None: the only one.
            places: what to call each key in an error; by default its number.
            token_logps: the logps of the single tokens too.

        Raises:
            MissingEntry: keys that are not there, or not with token logps; names their places.
        """
        if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
            raise CacheError(f"keys: expected uint8 [n, {KEY_BYTES}], got {keys.dtype} {list(keys.shape)}")
        named = reference if isinstance(reference, NamedReference) else self.reference(reference)
        return look_up(self.index(named), lambda: (self.path, self.reference(named.name)), keys, places, token_logps)

    def attach(
        self,
        dataset: Any,
        reference: str | None = None,
        *,
        tokenizer: Any = None,
        max_length: int | None = AS_BUILT,
        truncation_mode: str = AS_BUILT,
        prior: bool = False,
        token_logps: bool = False,
        ld_alpha: float | None = None,
        on_miss: str = "raise",
        model: Any = None,
        **build_keywords: Any,
    ) -> Any:
        """`dataset` with columns `ref_chosen_logps` and `ref_rejected_logps`, which TRL's collator and trainer read.

        Args:
            dataset: a `Dataset`; an `IterableDataset`, looked up as it is read; or a list of rows.
            reference: name; None: the only one.
            tokenizer: the policy's. None: the reference's own, as recorded. A reference that has another vocabulary
                than this one is read through its own either way, from the rows' text.
            max_length, truncation_mode: by default as the reference was last built.
            prior: also `ref_chosen_prior_logps` and `ref_rejected_prior_logps`, the unconditional ones.
            token_logps: also `ref_chosen_token_logps` and `ref_rejected_token_logps`, lists of floats.
            ld_alpha: DPOConfig's: weight of the tokens beyond the shorter completion of each pair.
            on_miss: "raise"; or "compute": score what is missing with `model`, and add it to the cache.
            model: for on_miss="compute": the reference, and `tokenizer` then its own.
            build_keywords: for on_miss="compute": those of `build`.

        Raises:
            MissingEntry: a row that is not in the cache. For an iterable data set, when it is read.
            CacheError: bad arguments; what `build` raises.

        Warns:
            UserWarning: how many completions have no token left within max_length, so a logp of 0.
        """
        first, every = rows.peek(dataset)
        asked = columns.Asked(tokenizer, max_length, truncation_mode, prior, token_logps, ld_alpha, on_miss, model)
        named, builder = columns.resolve(self, reference, first, asked, build_keywords)
        prepare = columns.preparation(named, first, tokenizer)
        parts = BuildOptions(prior=prior).parts
        found = columns.Columns(self, named, prepare, parts, ld_alpha, token_logps, builder)
        return columns.add(dataset, every, found)

    # --- keep --------------------------------------------------------------------------------------------------------

    def info(self) -> list[verify_.About]:
        """How much each reference holds.

        Raises:
            CacheError: the folder is no cache.
        """
        self._manifest.require()
        return [
            verify_.about(named, verify_.read(self.shards(named), named.reference))
            for named in self.references.values()
        ]

    def verify(self) -> list[verify_.Finding]:
        """Read every byte; what is wrong, and which rows it concerns. `build` computes those again. Changes nothing.

        Raises:
            CacheError: the folder is no cache.
        """
        return self.examine()[0]

    def examine(self) -> tuple[list[verify_.Finding], list[verify_.About]]:
        """`verify` and `info` of one reading."""
        self._manifest.require()
        return verify_.verify(self.path, self._manifest)

    def merge(self, others: SequenceOf[str | os.PathLike[str]] = ()) -> upkeep.Merged:
        """Take in other caches, and put small shards together. May run while others build, merge or read.

        Args:
            others: folders of caches, which stay as they are.

        Raises:
            CacheError: a folder that is no cache; a name that stands for another reference there; entries that
                disagree: which of them are right is not known here.
        """
        caches = [ReferenceCache(other) for other in others]
        for cache in [*caches, *([] if others else [self])]:
            cache._manifest.require()
        with claims.at_work(self.path):
            taken = [upkeep.take_in(self.path, self._manifest, cache.path) for cache in caches]
            merged = [upkeep.compact(self.path, named.reference) for named in self.references.values()]
        return upkeep.Merged(sum(taken), sum(before for before, _ in merged), sum(after for _, after in merged))

    def gc(self, drop: SequenceOf[str] = (), *, dry_run: bool = False) -> list[Path]:
        """Remove what nothing uses: entries of references without a name, replaced and damaged shards, old indexes,
        what killed builders left. Not while another machine reads through an index that this may remove.

        Args:
            drop: names to forget first.
            dry_run: only say what would go.

        Returns:
            The files that are gone.

        Raises:
            CacheError: someone is building or merging; an unknown name; the folder is no cache.
        """
        self._manifest.require()
        if dry_run:
            claims.refuse_while_building(self.path)
            return self._garbage(drop)
        with claims.collecting(self.path):
            gone = self._garbage(drop)
            for name in drop:
                self._manifest.drop(name)
            garbage.remove(self.path, gone)
        self._indexes.clear()
        return gone

    def _garbage(self, drop: SequenceOf[str]) -> list[Path]:
        named = self.references
        for name in drop:
            self._manifest.get(name)
        return garbage.find(self.path, {named[name].reference.id for name in named if name not in drop})
