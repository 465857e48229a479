"""What keeps a cache folder right and small: repair and merge. Both may run while others build and read.

A shard that takes the place of others names them (`replaces`). It counts from the moment it is there, they no more
from then on: a merge or repair that is cut short loses and doubles nothing. One at a time is at the shards of a
reference; should a claim be lost and two be, an entry may be gone, and is scored again.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import claims, files, index, journal, shard
from .errors import CacheError, DamagedShard
from .index import Index
from .key import Reference
from .manifest import Manifest
from .verify import DAMAGED, lost, positions, read

_MERGED_ENTRIES, _MERGED_BYTES = 1 << 17, 1 << 28  # of a merged shard, at most
_SHOWN = 20  # rows in an error


class Merged(NamedTuple):
    """What `merge` did, in shards."""

    taken: int  # from other caches
    before: int
    after: int


def shards_of(root: Path, reference: Reference) -> Path:
    """The folder of a reference's shards."""
    return root / "shards" / reference.id


@contextlib.contextmanager
def _alone(root: Path, reference: Reference) -> Iterator[None]:
    """Nobody else repairs or merges the shards of a reference meanwhile."""
    with claims.Claims(root / claims.FOLDER / reference.id) as mine:
        mine.wait("upkeep")
        yield


def repair(root: Path, reference: Reference) -> Index:
    """Take damaged shards and disagreeing or doubled entries out of use, so that a build computes what is missing.

    Returns an index of what is left, read from the shards.
    """
    for path in (root / "index" / reference.id).glob(f"*{index.SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            if not index.is_whole(path):
                path.unlink()
    found = read(shards_of(root, reference), reference)
    if not (found.damaged or found.conflicts or found.duplicates or lost(found)):
        return found
    with _alone(root, reference):
        found = read(found.folder, reference)  # another may have done it
        for name in found.damaged:
            _discard(found, name)
        sources = journal.read(found.folder)
        for number in range(len(found.shards) if found.conflicts or found.duplicates else 0):
            _rewrite(found, [number], sources)
        gone = lost(found)
        if gone:
            journal.Journal(found.folder).retired(*sorted(gone))
        return read(found.folder, reference)


def _discard(found: Index, name: str) -> None:
    """Take a shard out of use that still cannot be read."""
    path = found.folder / f"{name}{shard.SUFFIX}"
    try:
        shard.read(path, found.reference)
    except DamagedShard:
        _rename(path)
    except FileNotFoundError:
        pass


def _rename(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, path.with_name(path.name + DAMAGED))


def take_in(root: Path, manifest: Manifest, other: Path) -> int:
    """Copy the references and shards of another cache; returns how many shards were new.

    Raises:
        CacheError: damage there; entries that disagree. Nothing of a reference is copied then.
    """
    taken = 0
    for named in Manifest(other).all().values():
        source, target = (shards_of(path, named.reference) for path in (other, root))
        theirs, ours = (read(folder, named.reference) for folder in (source, target))
        if theirs.damaged:
            raise CacheError(f"{other}: {len(theirs.damaged)} damaged shards; build or verify it first")
        for found in (theirs, ours):
            _refuse_conflicts(found)
        _refuse_disagreement(theirs, ours, named.reference.rounding)
        manifest.create()
        manifest.put(named, overwrite=False)
        for info in theirs.shards:
            name = f"{info.name}{shard.SUFFIX}"
            if not (target / name).exists():
                files.write(target / name, (source / name).read_bytes())
                taken += 1
        for path in source.glob(f"*{journal.SUFFIX}"):
            copy = target / path.name
            if not copy.exists() or copy.stat().st_size < path.stat().st_size:
                files.write(copy, path.read_bytes())
    return taken


def compact(root: Path, reference: Reference) -> tuple[int, int]:
    """Put small shards together, each entry once; returns how many there were and are.

    Raises:
        CacheError: entries that disagree. Nothing is changed then.
    """
    with _alone(root, reference):
        found = read(shards_of(root, reference), reference)
        _refuse_conflicts(found)
        groups: dict[bool, list[list[int]]] = defaultdict(lambda: [[]])
        sizes: dict[bool, np.ndarray] = defaultdict(lambda: np.zeros(2, np.int64))
        for number, info in enumerate(found.shards):
            size = np.array([info.entries, (found.folder / f"{info.name}{shard.SUFFIX}").stat().st_size])
            if (sizes[info.has_tokens] + size > (_MERGED_ENTRIES, _MERGED_BYTES)).any():
                groups[info.has_tokens].append([])
                sizes[info.has_tokens] = np.zeros(2, np.int64)
            sizes[info.has_tokens] += size
            groups[info.has_tokens][-1].append(number)
        sources = journal.read(found.folder)
        for group in (group for of_kind in groups.values() for group in of_kind):
            _rewrite(found, group, sources)
        return len(found.shards), len(read(found.folder, reference).shards)


def _refuse_conflicts(found: Index) -> None:
    """Raise CacheError, with the rows, if entries of a folder disagree: dropping them would lose the right ones too."""
    if not found.conflicts:
        return
    sources = journal.read(found.folder)
    rows = [
        journal.describe(sources.get(info.name, []), at[:_SHOWN])
        for info in found.shards
        if (at := positions(found, info.name, found.conflicts))
    ]
    raise CacheError(
        f"{found.folder}: {len(found.conflicts)} entries disagree and are not merged ({'; '.join(rows)}); "
        "`fastdpo cache build` with that data computes them again"
    )


def _refuse_disagreement(theirs: Index, ours: Index, rounding: float) -> None:
    """Raise CacheError, with the rows, if two folders hold another logp for the same."""
    for info in theirs.shards:
        part = shard.read(theirs.folder / f"{info.name}{shard.SUFFIX}", theirs.reference)
        at = ours.find(part.keys)
        wrong = np.flatnonzero(at.found & ~index.agree(part.logp, part.counts, at.logp, at.counts, rounding))
        if len(wrong):
            rows = journal.describe(journal.read(theirs.folder).get(info.name, []), wrong[:_SHOWN].tolist())
            raise CacheError(
                f"{theirs.folder}: {len(wrong)} entries of {info.name}{shard.SUFFIX} disagree with those of "
                f"{ours.folder} by more than rounding ({rows}); nothing was taken in. Drop the worse of the two caches"
            )


def _rewrite(found: Index, numbers: list[int], sources: dict[str, list[journal.Origin]]) -> None:
    """One shard in place of some, with the entries that are not found elsewhere and that nothing disagrees with."""
    folder, names = found.folder, [found.shards[number].name for number in numbers]
    parts, origins, kept, whole = [], [], 0, True
    for number, name in zip(numbers, names, strict=True):
        try:
            part = shard.read(folder / f"{name}{shard.SUFFIX}", found.reference, tokens=True)
        except FileNotFoundError:  # another has rewritten it, after all
            return
        at = found.find(part.keys)
        mine = np.flatnonzero(at.found & (at.shard == number) & (at.position == np.arange(len(part))))
        whole = whole and len(mine) == len(part)
        tokens = None if part.token_logps is None else [part.token_logps[i] for i in mine]
        parts.append(shard.Shard(part.keys[mine], part.logp[mine], part.counts[mine], tokens, part.replaces))
        origins += _moved(sources.get(name, []), mine, kept)
        kept += len(mine)
    if whole and len(numbers) < 2:
        return
    # What these replaced may still lie there
    before = {old for part in parts for old in part.replaces if (folder / f"{old}{shard.SUFFIX}").exists()}
    if not kept:
        for old in sorted({*names, *before}):
            _rename(folder / f"{old}{shard.SUFFIX}")
        return
    merged = shard.Shard(
        np.concatenate([part.keys for part in parts]),
        np.concatenate([part.logp for part in parts]),
        np.concatenate([part.counts for part in parts]),
        None if parts[0].token_logps is None else [row for part in parts for row in part.token_logps or []],
        tuple(sorted({*names, *before})),
    )
    name, data = shard.encode(found.reference, merged)
    rows = journal.Journal(folder)
    rows.add(name, origins)
    shard.save(folder, name, data)
    rows.written(name)
    rows.retired(*merged.replaces)
    for old in merged.replaces:
        (folder / f"{old}{shard.SUFFIX}").unlink(missing_ok=True)


def _moved(origins: list[journal.Origin], kept: np.ndarray, first: int) -> list[journal.Origin]:
    """Where entries `kept` of a shard come from, once they are entries `first`, ... of another."""
    moved: list[journal.Origin] = []
    for origin in origins:
        inside = (kept >= origin.first) & (kept < origin.first + len(origin.rows))
        for at, old in zip(np.flatnonzero(inside), kept[inside] - origin.first, strict=True):
            row, part = origin.rows[old], origin.parts[old]
            last = moved[-1] if moved else None
            if last is not None and last.source == origin.source and last.first + len(last.rows) == first + at:
                last.rows.append(row)
                last.parts.append(part)
            else:
                moved.append(journal.Origin(int(first + at), origin.source, [row], [part]))
    return moved
