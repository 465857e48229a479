"""What keeps a cache folder right and small: verify, repair, merge, gc. Each says what it may do while others build.

A shard that takes the place of others names them (`replaces`). It counts from the moment it is there, they no more
from then on: a merge or repair that is cut short, or done twice at once, loses and doubles nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import claims, files, index, journal, shard
from .errors import CacheError
from .index import Index
from .key import Reference
from .manifest import Manifest, NamedReference

DAMAGED = ".damaged"  # suffix that takes a shard out of use
_ID = re.compile("[0-9a-f]{32}")
_MERGED_ENTRIES, _MERGED_BYTES = 1 << 17, 1 << 28  # of a merged shard, at most
_ABANDONED = 3600.0  # seconds after which an unfinished file is left over


class Finding(NamedTuple):
    """Something wrong."""

    where: str  # file, below the cache's folder
    what: str
    rows: str  # whom it concerns

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; concerns {self.rows}" if self.rows else f"{self.where}: {self.what}"


class About(NamedTuple):
    """What one reference holds."""

    named: NamedReference
    entries: int
    with_tokens: int  # entries that have token logps
    shards: int
    size: int  # bytes
    damaged: int  # shards


class Merged(NamedTuple):
    """What `merge` did, in shards."""

    taken: int  # from other caches
    before: int
    after: int


def about(named: NamedReference, folder: Path) -> About:
    """Count what a folder of shards holds."""
    entries = _read(folder, named.reference)
    sizes = 0
    for path in folder.glob(f"*{shard.SUFFIX}"):
        with contextlib.suppress(OSError):
            sizes += path.stat().st_size
    tokens = sum(info.entries for info in entries.shards if info.has_tokens)
    return About(named, len(entries), tokens, len(entries.shards), sizes, len(entries.damaged))


# --- verify ----------------------------------------------------------------------------------------------------------


def verify(root: Path, manifest: Manifest) -> list[Finding]:
    """Read every shard of every reference below `root`; changes nothing."""
    findings = []
    manifest.check()
    named: dict[str, Reference] = {}
    for path in sorted((root / "references").glob("*.json")):
        try:
            reference = manifest.get(path.stem).reference
            named[reference.id] = reference
        except CacheError as error:
            findings.append(Finding(str(path.relative_to(root)), str(error), ""))
    for folder in sorted(path for path in (root / "shards").glob("*") if path.is_dir()):
        found, origins = _read(folder, named.get(folder.name, folder.name)), journal.read(folder)
        for name, why in sorted(found.damaged.items()):
            rows = journal.describe(origins.get(name, []))
            findings.append(Finding(_where(root, folder, name), why.partition(": ")[2], rows))
        for what, keys in (("duplicate", found.duplicates), ("disagreeing", found.conflicts)):
            for info in found.shards if keys else ():
                shard_keys = shard.read(folder / f"{info.name}{shard.SUFFIX}", folder.name).keys
                at = [i for i, key in enumerate(shard_keys) if key.tobytes() in keys]
                if at:
                    rows = journal.describe(origins.get(info.name, []), at)
                    text = f"{len(at)} {what} entries: another shard holds them too"
                    findings.append(Finding(_where(root, folder, info.name), text, rows))
    return findings


def _where(root: Path, folder: Path, name: str) -> str:
    return str((folder / f"{name}{shard.SUFFIX}").relative_to(root))


def _read(folder: Path, reference: Reference | str) -> Index:
    """The shards themselves, every byte of them. Of a reference without a name, only the id is known."""
    known = (reference, 0.0) if isinstance(reference, str) else (reference.id, reference.rounding)
    found = Index(folder, None, *known)
    found.refresh()
    return found


# --- repair, merge ---------------------------------------------------------------------------------------------------


def repair(folder: Path, reference: Reference) -> Index:
    """Take damaged shards and disagreeing or doubled entries out of use, so that a build computes what is missing.

    Returns an index of what is left, read from the shards. May run while others build.
    """
    found = _read(folder, reference)
    for name in found.damaged:
        path = folder / f"{name}{shard.SUFFIX}"
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, path.with_name(path.name + DAMAGED))
    if found.conflicts or found.duplicates:
        sources = journal.read(folder)
        for number in range(len(found.shards)):
            _rewrite(found, [number], reference.id, sources)
        found = _read(folder, reference)
    return found


def take_in(root: Path, manifest: Manifest, other: Path) -> int:
    """Copy the references and shards of another cache; returns how many shards were new. May run while others build."""
    taken = 0
    theirs = Manifest(other)
    for named in theirs.all().values():
        manifest.create()
        manifest.put(named, overwrite=False)
        source, target = (path / "shards" / named.reference.id for path in (other, root))
        found = _read(source, named.reference)
        if found.damaged:
            raise CacheError(f"{other}: {len(found.damaged)} damaged shards; build or verify it first")
        for path in source.glob(f"*{journal.SUFFIX}"):
            files.write(target / path.name, path.read_bytes())
        for info in found.shards:
            name = f"{info.name}{shard.SUFFIX}"
            if not (target / name).exists():
                files.write(target / name, (source / name).read_bytes())
                taken += 1
    return taken


def compact(folder: Path, reference: Reference) -> tuple[int, int]:
    """Put small shards together, each entry once; returns how many there were and are. May run while others build."""
    found = _read(folder, reference)
    before = len(found.shards)
    groups: dict[bool, list[list[int]]] = defaultdict(lambda: [[]])
    sizes: dict[bool, np.ndarray] = defaultdict(lambda: np.zeros(2, np.int64))
    for number, info in enumerate(found.shards):
        size = np.array([info.entries, (folder / f"{info.name}{shard.SUFFIX}").stat().st_size])
        if (sizes[info.has_tokens] + size > (_MERGED_ENTRIES, _MERGED_BYTES)).any():
            groups[info.has_tokens].append([])
            sizes[info.has_tokens] = np.zeros(2, np.int64)
        sizes[info.has_tokens] += size
        groups[info.has_tokens][-1].append(number)
    sources = journal.read(folder)
    for group in (group for of_kind in groups.values() for group in of_kind):
        _rewrite(found, group, reference.id, sources)
    return before, len(_read(folder, reference).shards)


def _rewrite(found: Index, numbers: list[int], reference: str, sources: dict[str, list[journal.Origin]]) -> None:
    """One shard in place of some, with the entries that are not found elsewhere and that nothing disagrees with."""
    folder, names = found.folder, [found.shards[number].name for number in numbers]
    parts, origins, kept, whole = [], [], 0, True
    for number, name in zip(numbers, names, strict=True):
        part = shard.read(folder / f"{name}{shard.SUFFIX}", reference, tokens=True)
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
    merged = shard.Shard(
        np.concatenate([part.keys for part in parts]),
        np.concatenate([part.logp for part in parts]),
        np.concatenate([part.counts for part in parts]),
        None if parts[0].token_logps is None else [row for part in parts for row in part.token_logps or []],
        tuple(sorted({*names, *before})),
    )
    name, data = shard.encode(reference, merged)
    journal.Journal(folder).add(name, origins)
    shard.save(folder, name, data)
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


# --- gc --------------------------------------------------------------------------------------------------------------


def garbage(root: Path, keep: set[str]) -> list[Path]:
    """Files that nothing uses, if only the references with these ids are kept.

    Raises:
        CacheError: someone is building.
    """
    folders = [path for path in (root / "shards").glob("*") if path.is_dir() and _ID.fullmatch(path.name)]
    building = [claim for folder in folders for claim in claims.live(folder)]
    if building:
        raise CacheError(f"{building[0]}: someone is building; collect garbage when they are done")
    gone = []
    for folder in folders:
        there = list(folder.iterdir())
        if folder.name not in keep:
            gone += there
            continue
        found = _read(folder, folder.name)
        used = {f"{info.name}{shard.SUFFIX}" for info in found.shards}
        named_rows = {path.name for path in there if path.name.endswith(journal.SUFFIX)}
        damaged = {f"{name}{shard.SUFFIX}" for name in found.damaged}  # for `build` to take out of use
        gone += [path for path in there if path.name not in used | named_rows | damaged]
    for folder in (root / "index").glob("*"):
        files_there = sorted(folder.glob(f"*{index.SUFFIX}"), key=lambda path: path.stat().st_size)
        gone += files_there[:-1] if folder.name in keep else files_there
        unfinished = folder.glob(f".*{files.TEMPORARY}")
        gone += [path for path in unfinished if time.time() - path.stat().st_mtime > _ABANDONED]
    return gone


def remove(root: Path, gone: list[Path]) -> None:
    """Delete files, and the folders that are empty then; and the rows of shards that are no more."""
    for path in gone:
        path.unlink(missing_ok=True)
    for kind in ("shards", "index"):
        for folder in (root / kind).glob("*"):
            with contextlib.suppress(OSError):
                folder.rmdir()
    for folder in (root / "shards").glob("*"):
        there = {path.name.removesuffix(shard.SUFFIX) for path in folder.glob(f"*{shard.SUFFIX}")}
        old = list(folder.glob(f"*{journal.SUFFIX}"))
        kept = {name: origins for name, origins in journal.read(folder).items() if name in there}
        fresh = journal.Journal(folder)
        for name, origins in kept.items():
            fresh.add(name, origins)
        for path in old:
            path.unlink(missing_ok=True)
