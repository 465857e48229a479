"""All entries of one reference, sorted by key: how a batch of keys is looked up.

The shards are the truth. An index file is what was read from them, every byte checked, and kept so that the next
process need not read them again: an Arrow file, memory-mapped, named by the SHA-256 of its bytes like a shard. One
whose bytes do not hash to its name, or that knows a shard which is gone, is not used. Shards that it does not know are
read at opening; once they are many, a new one is written. Old ones are left to `gc`: another machine may have them
mapped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from . import files, shard
from .errors import DamagedShard
from .key import halves

SUFFIX = ".arrow"
_METADATA = b"fastdpo"
# Fewer entries are quickly read from their shards. More are worth a file once they are a quarter of those in the last
# one, so that all the files there ever were are at most five times the last
_WORTH_A_FILE = 16384
_GROWTH = 0.25
_TRIES = 20  # looks at a folder in which others merge


class ShardInfo(NamedTuple):
    """What is known of a shard without reading it again."""

    name: str  # without suffix
    entries: int
    has_tokens: bool
    replaces: tuple[str, ...]


class Found(NamedTuple):
    """What n keys led to; 0 where `found` is False."""

    found: np.ndarray  # bool [n]
    logp: np.ndarray  # float64 [n]
    counts: np.ndarray  # int32 [n], counted tokens
    shard: np.ndarray  # int32 [n], into `Index.shards`
    position: np.ndarray  # int32 [n], the row there


class _Run(NamedTuple):
    """Entries sorted by (hi, lo), each key once."""

    hi: np.ndarray  # uint64 [n]
    lo: np.ndarray  # uint64 [n]
    logp: np.ndarray
    counts: np.ndarray
    shard: np.ndarray
    position: np.ndarray

    def find(self, hi: np.ndarray, lo: np.ndarray) -> np.ndarray:
        """int64: where each key is, -1 where it is not."""
        where = np.full(len(hi), -1, np.int64)
        at = np.searchsorted(self.hi, hi)
        asked = np.arange(len(hi))
        while len(asked):  # once, but for keys whose first halves are equal
            asked = asked[at[asked] < len(self.hi)]
            asked = asked[self.hi[at[asked]] == hi[asked]]
            hit = self.lo[at[asked]] == lo[asked]
            where[asked[hit]] = at[asked[hit]]
            asked = asked[~hit]
            at[asked] += 1
        return where

    def take(self, rows: np.ndarray) -> _Run:
        return _Run(*(column[rows] for column in self))

    def keys(self, rows: np.ndarray) -> set[bytes]:
        words = np.stack([self.hi[rows], self.lo[rows]], axis=1).astype(">u8")
        return {word.tobytes() for word in words}


def is_whole(path: Path) -> bool:
    """Whether the bytes of an index file are those that were written."""
    return _whole(path) is not None


def _whole(path: Path) -> pa.Buffer | None:
    """The bytes, memory-mapped; None if they do not hash to the file's name."""
    buffer = pa.memory_map(str(path)).read_buffer()
    return buffer if hashlib.sha256(buffer).hexdigest() == path.stem else None


def agree(
    logp: np.ndarray, counts: np.ndarray, other_logp: np.ndarray, other_counts: np.ndarray, rounding: float
) -> np.ndarray:
    """bool [n]: which entries are the same but for rounding, relative to the logp."""
    near = np.abs(logp - other_logp) <= rounding * np.maximum(1.0, np.abs(other_logp))
    return near & (counts == other_counts)


class Index:
    """The entries of one reference. Empty until `refresh()`.

    Args:
        shards: folder of its shards.
        files_in: folder of its index files; None: neither read nor write any.
        reference: its id.
        rounding: relative difference up to which two logps of one key agree.
    """

    def __init__(self, shards: Path, files_in: Path | None, reference: str, rounding: float = 0.0) -> None:
        self.folder, self._files_in, self.reference, self._rounding = shards, files_in, reference, rounding
        self.damaged: dict[str, str] = {}  # name of a shard -> why it was not read
        self._reset()

    def _reset(self) -> None:
        self.shards: list[ShardInfo] = []
        self.conflicts: set[bytes] = set()  # keys whose entries disagree; they are not to be found
        self.duplicates: set[bytes] = set()  # keys with several entries that agree
        self._base: _Run | None = None  # memory-mapped
        self._fresh: _Run | None = None  # read since; wins over the base where both have a key

    def __len__(self) -> int:
        return sum(len(run.hi) for run in self._runs())

    def find(self, keys: np.ndarray) -> Found:
        """Look up keys uint8 `[n, 16]`, all at once."""
        hi, lo = halves(keys)
        result = Found(*(np.zeros(len(hi), dtype) for dtype in "?diii"))
        for run in self._runs():
            where = run.find(hi, lo)
            hit = where >= 0
            result.found[hit] = True
            for column, values in zip(result[1:], run[2:], strict=True):
                column[hit] = values[where[hit]]
        if self.conflicts:
            result.found[[key.tobytes() in self.conflicts for key in keys]] = False
        return result

    def has_tokens(self, found: Found) -> np.ndarray:
        """bool `[n]`: which of the entries have token logps."""
        has = np.array([*(info.has_tokens for info in self.shards), False])
        return has[np.where(found.found, found.shard, -1)]

    def token_logps(self, found: Found) -> list[np.ndarray]:
        """Token logps, float32 `[count]` each, of entries that all have them."""
        rows = [np.empty(0, np.float32)] * len(found.found)
        order = np.argsort(found.shard, kind="stable")
        for mine in np.split(order, np.flatnonzero(np.diff(found.shard[order])) + 1) if len(order) else ():
            name = self.shards[found.shard[mine[0]]].name
            tokens = shard.read(self._path(name), self.reference, tokens=True).token_logps
            assert tokens is not None, "has_tokens"
            for i in mine:
                rows[i] = tokens[found.position[i]].copy()  # a view would keep all of the shard's
        return rows

    def refresh(self) -> None:
        """Take in what was written, merged or removed since."""
        for _ in range(_TRIES):
            if self._refresh():
                break

    def _refresh(self) -> bool:
        """Whether no shard went away between being listed and being read."""
        paths = self.folder.glob(f"*{shard.SUFFIX}") if self.folder.is_dir() else ()
        listed = {path.name.removesuffix(shard.SUFFIX) for path in paths}
        if not {info.name for info in self.shards} <= listed:
            self._reset()
        if not self.shards:
            self._load(listed)
        self.damaged = {}  # a shard of the same name may have been written again since
        whole = self._read(listed)
        replaced = {name for info in self.shards for name in info.replaces}
        if not replaced.isdisjoint(info.name for info in self.shards):
            self._reset()
            whole = self._read(listed - replaced)
        if whole:
            self._save()
        return whole

    # --- from shards -------------------------------------------------------------------------------------------------

    def _runs(self) -> list[_Run]:
        return [run for run in (self._base, self._fresh) if run is not None]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{shard.SUFFIX}"

    def _read(self, listed: set[str]) -> bool:
        """Add the shards that are not known yet; False if one of them is gone."""
        whole = True
        runs = [] if self._fresh is None else [self._fresh]
        known = {name for info in self.shards for name in (info.name, *info.replaces)}
        for name in sorted(listed - known):
            try:
                part = shard.read(self._path(name), self.reference)
            except DamagedShard as error:
                self.damaged[name] = str(error)
                continue
            except FileNotFoundError:  # merged a moment ago; the next look sees into what
                whole = False
                continue
            number, n = len(self.shards), len(part)
            self.shards.append(ShardInfo(name, n, part.token_logps is not None, part.replaces))
            rows = np.arange(n, dtype=np.int32)
            runs.append(_Run(*halves(part.keys), part.logp, part.counts, np.full(n, number, np.int32), rows))
        if len(runs) > (self._fresh is not None):
            self._fresh = self._against_base(self._sorted(runs))
        return whole

    def _sorted(self, runs: list[_Run]) -> _Run:
        """One run of several. Notes the keys that are in them more than once."""
        run = _Run(*(np.concatenate(columns) for columns in zip(*runs, strict=True)))
        order = np.argsort(run.hi)
        hi = run.hi[order]
        if not (hi[1:] == hi[:-1]).any():
            return run.take(order)
        # Of one key, an entry with token logps comes first: it was computed to take the other's place
        tokens = np.array([info.has_tokens for info in self.shards])[run.shard]
        order = np.lexsort((~tokens, run.lo, run.hi))
        run, tokens = run.take(order), tokens[order]
        again = np.zeros(len(order), np.bool_)
        again[1:] = (run.hi[1:] == run.hi[:-1]) & (run.lo[1:] == run.lo[:-1])
        first = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
        rivals = np.flatnonzero(again)
        self._note(run, rivals, run, first[rivals], tokens[rivals] == tokens[first[rivals]])
        return run.take(np.flatnonzero(~again))

    def _against_base(self, fresh: _Run) -> _Run:
        """What of a run is new, or has token logps where the base has none. Notes the rest."""
        if self._base is None:
            return fresh
        where = self._base.find(fresh.hi, fresh.lo)
        tokens = np.array([info.has_tokens for info in self.shards])
        known = np.flatnonzero(where >= 0)
        ours, theirs = tokens[fresh.shard[known]], tokens[self._base.shard[where[known]]]
        self._note(fresh, known, self._base, where[known], ours == theirs)
        keep = where < 0
        keep[known[ours & ~theirs]] = True
        return fresh.take(np.flatnonzero(keep))

    def _note(self, a: _Run, rows: np.ndarray, b: _Run, others: np.ndarray, alike: np.ndarray) -> None:
        """Entries `rows` of a have the keys of entries `others` of b. Not `alike`: only one has token logps."""
        same = agree(a.logp[rows], a.counts[rows], b.logp[others], b.counts[others], self._rounding)
        self.duplicates |= a.keys(rows[same & alike])
        self.conflicts |= a.keys(rows[~same])
        self.duplicates -= self.conflicts

    # --- the file ----------------------------------------------------------------------------------------------------

    def _load(self, listed: set[str]) -> None:
        """Map the largest index file whose bytes are right and whose shards are all there."""
        if self._files_in is None or not self._files_in.is_dir():
            return
        sizes = {}
        for path in self._files_in.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):
                sizes[path] = path.stat().st_size
        for path in sorted(sizes, key=lambda path: sizes[path], reverse=True):
            with contextlib.suppress(OSError, KeyError, TypeError, ValueError, pa.ArrowException):
                buffer = _whole(path)
                if buffer is None:
                    continue
                table = pa.ipc.open_file(buffer).read_all()
                about = json.loads(table.schema.metadata[_METADATA])
                shards = [ShardInfo(n, e, t, tuple(r)) for n, e, t, r in about["shards"]]
                if about["reference"] != self.reference or not {info.name for info in shards} <= listed:
                    continue
                self._base = _Run(*(table[name].chunk(0).to_numpy(zero_copy_only=True) for name in _Run._fields))
                self.shards = shards
                self.conflicts = {bytes.fromhex(key) for key in about["conflicts"]}
                return

    def _save(self) -> None:
        """Make one run of both, and a file of it, once what was read since is worth it."""
        fresh, base = self._fresh, self._base
        known = 0 if base is None else len(base.hi)
        if fresh is None or len(fresh.hi) < max(_WORTH_A_FILE, _GROWTH * known):
            return
        if base is not None:
            conflicts, duplicates = set(self.conflicts), set(self.duplicates)
            fresh = self._sorted([base, fresh])
            self.conflicts, self.duplicates = conflicts, duplicates  # were noted when they were read
        self._base, self._fresh = fresh, None
        if self._files_in is None:
            return
        about = {
            "format": 1,
            "reference": self.reference,
            "shards": self.shards,
            "conflicts": sorted(key.hex() for key in self.conflicts),
        }
        table = pa.table(self._base._asdict()).replace_schema_metadata({_METADATA: json.dumps(about).encode()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        data = memoryview(sink.getvalue())
        with contextlib.suppress(OSError):  # a folder that cannot be written serves from memory
            files.write(self._files_in / f"{hashlib.sha256(data).hexdigest()}{SUFFIX}", data, sync=False)
            self._load({info.name for info in self.shards})
