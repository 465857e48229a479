"""Score what a data set needs and the cache does not hold.

Plan: the keys of all rows, each once, longest first, cut into chunks; the same for every builder of the same data.
Then, some chunks at a time: claim them, drop what is there by now, score each in batches of its own, write a shard. A
builder that is killed loses the shard it was at, and whoever comes next scores those chunks in the same batches, so to
the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import claims as claims_
from . import files, journal, shard
from .claims import Claims
from .errors import CacheError
from .index import Index
from .key import Sequence, as_array, halves
from .manifest import NamedReference
from .model import ReferenceModel
from .options import BuildOptions, BuildReport
from .rows import PARTS, Preparation, Row, sequence

WINDOW = 8192  # rows of an iterable data set that are planned together
_CHUNK = 128  # sequences; what is claimed, and batched, together
_FLUSH = 30.0  # seconds after which a shard is written though it is not full


@dataclass
class _Plan:
    """n sequences to have, each key once, longest first."""

    rows: Any  # of the data, to be indexed
    first: int  # the number of rows[0]
    keys: np.ndarray  # uint8 [n, 16]
    row: np.ndarray  # int64 [n], into `rows`
    part: np.ndarray  # int64 [n], index into PARTS
    total: int  # sequences, duplicates included
    empty: int

    def place(self, i: int) -> str:
        """What to call sequence i."""
        return f"row {self.first + self.row[i]} {PARTS[self.part[i]]}"


class Builder:
    """One process at work on the shards of one reference.

    Args:
        root: the cache's folder.
        index: of the reference's shards; refreshed here. One that has read the shards themselves.
    """

    def __init__(
        self,
        root: Path,
        index: Index,
        model: ReferenceModel,
        named: NamedReference,
        prepare: Preparation,
        options: BuildOptions,
    ) -> None:
        self._root, self._index, self._model, self.named, self._prepare = root, index, model, named, prepare
        self._options, self._folder = options, index.folder
        self._journal = journal.Journal(self._folder)
        self._refused: dict[bytes, str] = {}  # keys that have no finite logp -> where they are
        self._shards = 0

    def run(self, rows: Any) -> BuildReport:
        """Returns once every sequence of `rows` is in the cache, whoever scored it.

        Args:
            rows: that can be indexed; or any iterable of rows, which is read in windows.

        Raises:
            CacheError: rows whose logp is not finite, after all others were scored; rows that the model cannot score.
        """
        with claims_.at_work(self._root):
            return self._run(rows)

    def _run(self, rows: Any) -> BuildReport:
        report = BuildReport(self.named.name)
        for first, window in _windows(rows):
            plan = self._plan(window, first)
            self._index.refresh()
            missing = self._missing(plan, np.arange(len(plan.keys)))
            written = self._shards
            scored = self._fill(plan, missing) if len(missing) else 0
            report.sequences += plan.total
            report.duplicates += plan.total - len(plan.keys)
            report.cached += len(plan.keys) - len(missing)
            report.scored += scored
            report.elsewhere += (
                len(missing) - scored - sum(key.tobytes() in self._refused for key in plan.keys[missing])
            )
            report.empty += plan.empty
            report.shards += self._shards - written
        if self._refused:
            raise CacheError(
                f"{len(self._refused)} sequences have no finite logp in {self.named.reference.dtype} and were not "
                f"stored: {', '.join(itertools.islice(self._refused.values(), 20))}"
            )
        return report

    def _plan(self, rows: Any, first: int) -> _Plan:
        keys, places, lengths, empty = [], [], [], 0
        for number, row in enumerate(self._bar(rows, "reading", unit="row", leave=False)):
            prepared = self._prepare.numbered(row, f"{self._options.source}: row {first + number}")
            for part in self._options.parts:
                found = self._sequence(prepared, part)
                keys.append(found.key(self.named.reference))
                lengths.append(len(found.ids))
                places.append((number, part))
                empty += not found.counted.any()
        every = as_array(keys)
        hi, lo = halves(every)
        # Of equal keys, the first row comes first
        order = np.lexsort((lo, hi, -np.array(lengths, np.int64)))
        again = np.zeros(len(order), np.bool_)
        again[1:] = (hi[order[1:]] == hi[order[:-1]]) & (lo[order[1:]] == lo[order[:-1]])
        order = order[~again]
        row_, part_ = np.array(places, np.int64).reshape(-1, 2)[order].T
        return _Plan(rows, first, every[order], row_, part_, len(keys), empty)

    def _sequence(self, prepared: Row, part: int) -> Sequence:
        return sequence(prepared, part, self.named.max_length, self.named.truncation_mode, self.named.prior_prefix)

    def _bar(self, over: Any, what: str, **keywords: Any) -> Any:
        from tqdm import tqdm

        return tqdm(over, f"{self.named.name}: {what}", disable=not self._options.progress, **keywords)

    # --- chunks ------------------------------------------------------------------------------------------------------

    def _missing(self, plan: _Plan, rows: np.ndarray) -> np.ndarray:
        """Which of some rows of the plan are still to be scored."""
        found = self._index.find(plan.keys[rows])
        there = self._index.has_tokens(found) if self._options.token_logps else found.found
        if self._refused:
            there = there | [plan.keys[i].tobytes() in self._refused for i in rows]
        return rows[~there]

    def _fill(self, plan: _Plan, missing: np.ndarray) -> int:
        """Score the missing rows of a plan, with whoever else is at it; returns how many this process did."""
        size, done, pause = min(_CHUNK, self._options.shard_size), 0, 0.0
        todo = [np.arange(i, min(i + size, len(plan.keys))) for i in np.unique(missing // size) * size]
        left = {int(chunk[0]): int(((missing >= chunk[0]) & (missing <= chunk[-1])).sum()) for chunk in todo}
        folder = self._root / claims_.FOLDER / self.named.reference.id
        with Claims(folder) as claims, self._bar(None, "scoring", total=len(missing), unit="seq") as bar:
            while todo:
                self._index.refresh()
                claimed, todo, finished = self._claim(plan, todo, claims)
                for chunk in finished:
                    bar.update(left.pop(int(chunk[0])))
                if not claimed and todo:  # all that is left is being scored by others
                    pause = min(max(2 * pause, 0.05), 2.0)
                    time.sleep(pause)
                    continue
                pause = 0.0
                # What was finished between our look and our claim is seen now; on NFS, once the listing is fetched anew
                files.touch(self._folder)
                self._index.refresh()
                unit = [self._missing(plan, chunk) for chunk in claimed.values()]
                for chunk, rows in zip(claimed.values(), unit, strict=True):
                    bar.update(left.pop(int(chunk[0])) - len(rows))
                done += self._score(plan, unit, bar.update)
                claims.release(list(claimed))
        return done

    def _claim(
        self, plan: _Plan, todo: list[np.ndarray], claims: Claims
    ) -> tuple[dict[str, np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """(claimed chunks, at most a shard of them; chunks left; chunks that need nothing any more)"""
        # Less towards the end, so that several builders finish at about the same time
        limit = min(self._options.shard_size, len(todo) * _CHUNK // 8)
        claimed: dict[str, np.ndarray] = {}
        left: list[np.ndarray] = []
        finished, size = [], 0
        for i, chunk in enumerate(todo):
            missing = len(self._missing(plan, chunk))
            if not missing:
                finished.append(chunk)
            elif claimed and size + missing > limit:
                left += todo[i:]
                break
            else:
                piece = hashlib.blake2b(plan.keys[chunk].tobytes(), digest_size=16)
                piece.update(bytes([self._options.token_logps]))
                if claims.take(piece.hexdigest()):
                    claimed[piece.hexdigest()] = chunk
                    size += missing
                else:
                    left.append(chunk)
        return claimed, left, finished

    # --- scoring -----------------------------------------------------------------------------------------------------

    def _score(self, plan: _Plan, unit: list[np.ndarray], progress: Callable[[int], Any]) -> int:
        """Score chunks, each in batches of its own, and write them; returns how many sequences have a logp now."""
        done, kept, started = 0, {}, time.monotonic()
        self._model.check_unchanged()
        for number, rows in enumerate(unit, start=1):
            for batch in self._batches(plan, rows):
                try:
                    results = self._model.scorer([found for _, found in batch])
                except CacheError as error:
                    places = ", ".join(plan.place(i) for i, _ in batch)
                    raise CacheError(f"{self._options.source}, among {places}: {error}") from None
                for (i, _), logps in zip(batch, results, strict=True):
                    if np.isfinite(logps).all():
                        kept[i] = logps
                    else:
                        self._refused[plan.keys[i].tobytes()] = plan.place(i)
                progress(len(batch))
            if kept and (number == len(unit) or time.monotonic() - started > _FLUSH):
                self._write(plan, kept)
                done += len(kept)
                kept, started = {}, time.monotonic()
        for pause in (0, 0.1, 1.0):  # somebody may be merging what was written
            time.sleep(pause)
            self._index.refresh()  # reads it back
            if not any(len(self._missing(plan, rows)) for rows in unit):
                break
        else:
            raise CacheError(f"{self._folder}: cannot read back the shard that was just written")
        return done

    def _write(self, plan: _Plan, tokens: dict[int, np.ndarray]) -> None:
        """One shard of rows of the plan."""
        self._model.check_unchanged()  # another thread may train it
        rows = np.array(list(tokens))
        entries = shard.Shard(
            plan.keys[rows],
            np.array([logps.sum(dtype=np.float64) for logps in tokens.values()]),
            np.array([len(logps) for logps in tokens.values()], np.int32),
            list(tokens.values()) if self._options.token_logps else None,
        )
        name, data = shard.encode(self.named.reference.id, entries)
        numbers, parts = (plan.first + plan.row[rows]).tolist(), plan.part[rows].tolist()
        self._journal.add(name, [journal.Origin(0, self._options.source, numbers, parts)])
        shard.save(self._folder, name, data)
        self._journal.written(name)
        self._shards += 1

    def _batches(self, plan: _Plan, rows: np.ndarray) -> Iterator[list[tuple[int, Sequence]]]:
        """(row of the plan, its sequence), longest first, as many as batch_tokens holds."""
        prepared: dict[int, Row] = {}
        batch: list[tuple[int, Sequence]] = []
        for i in rows:
            number = int(plan.row[i])
            if number not in prepared:
                prepared[number] = self._prepare(plan.rows[number])
            found = self._sequence(prepared[number], plan.part[i])
            if found.key(self.named.reference) != plan.keys[i].tobytes():
                raise CacheError(f"{self._options.source}: {plan.place(i)} changed while it was read")
            if batch and (len(batch) + 1) * len(batch[0][1].ids) > self._options.batch_tokens:
                yield batch
                batch = []
            batch.append((int(i), found))
        if batch:
            yield batch


def _windows(rows: Any) -> Iterator[tuple[int, Any]]:
    """(number of the first row, rows that can be indexed)"""
    if hasattr(rows, "__getitem__") and hasattr(rows, "__len__"):
        yield 0, rows
        return
    rows, first = iter(rows), 0
    while window := list(itertools.islice(rows, WINDOW)):
        yield first, window
        first += len(window)


@contextlib.contextmanager
def untouched_random_state() -> Iterator[None]:
    """Whatever happens inside, torch's, NumPy's and Python's global generators come out as they went in."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  it is the global one that is meant
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
