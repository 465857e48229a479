"""What a cache holds, and what is wrong with it: every byte is read, nothing is changed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

from . import index, journal, shard
from .errors import CacheError
from .index import Index
from .key import Reference
from .manifest import Manifest, NamedReference

DAMAGED = ".damaged"  # suffix that takes a shard out of use


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


def read(folder: Path, reference: Reference | str) -> Index:
    """The shards themselves, every byte of them. Of a reference without a name, only the id is known."""
    known = (reference, 0.0) if isinstance(reference, str) else (reference.id, reference.rounding)
    found = Index(folder, None, *known)
    found.refresh()
    return found


def about(named: NamedReference, found: Index) -> About:
    """Count what a folder of shards holds."""
    size = 0
    for path in found.folder.glob(f"*{shard.SUFFIX}"):
        with contextlib.suppress(OSError):
            size += path.stat().st_size
    tokens = sum(info.entries for info in found.shards if info.has_tokens)
    return About(named, len(found), tokens, len(found.shards), size, len(found.damaged))


def verify(root: Path, manifest: Manifest) -> tuple[list[Finding], list[About]]:
    """(what is wrong, what each reference holds)"""
    findings = [Finding(str(path.relative_to(root)), why, "") for path, why in manifest.wrong()]
    named = manifest.readable()
    by_id = {about.reference.id: about.reference for about in named}
    indexes: dict[str, Index] = {}
    for folder in sorted(path for path in (root / "shards").glob("*") if path.is_dir()):
        indexes[folder.name] = found = read(folder, by_id.get(folder.name, folder.name))
        findings += _of_shards(root, found)
    for path in sorted((root / "index").glob(f"*/*{index.SUFFIX}")):
        with contextlib.suppress(FileNotFoundError):
            if not index.is_whole(path):
                text = f"damaged: its {path.stat().st_size:,} bytes do not hash to its name; it is not read"
                findings.append(Finding(str(path.relative_to(root)), text, ""))
    empty = Index(root / "shards", None, "")
    return findings, [about(one, indexes.get(one.reference.id, empty)) for one in named]


def _of_shards(root: Path, found: Index) -> list[Finding]:
    """What is wrong with the shards of one reference."""
    folder, origins, findings = found.folder, journal.read(found.folder), []

    def add(name: str, what: str, rows: str) -> None:
        findings.append(Finding(str((folder / f"{name}{shard.SUFFIX}").relative_to(root)), what, rows))

    for name, why in sorted(found.damaged.items()):
        add(name, why.partition(": ")[2], journal.describe(origins.get(name, [])))
    for name in sorted(lost(found)):
        add(name, "was written, and is gone", journal.describe(origins.get(name, [])))
    for what, keys in (("duplicate", found.duplicates), ("disagreeing", found.conflicts)):
        for info in found.shards if keys else ():
            at = positions(found, info.name, keys)
            if at:
                rows = journal.describe(origins.get(info.name, []), at)
                add(info.name, f"{len(at)} {what} entries: another shard holds them too", rows)
    return findings


def positions(found: Index, name: str, keys: set[bytes]) -> list[int]:
    """Which entries of a shard have one of these keys."""
    try:
        part = shard.read(found.folder / f"{name}{shard.SUFFIX}", found.reference)
    except (FileNotFoundError, CacheError):  # merged or damaged since; the next look sees it
        return []
    return [i for i, key in enumerate(part.keys) if key.tobytes() in keys]


def lost(found: Index) -> set[str]:
    """Names of shards that were written, that nobody took out of use, and that are not there."""
    there = {info.name for info in found.shards} | {old for info in found.shards for old in info.replaces}
    names = journal.expected(found.folder) - there - set(found.damaged)
    return {name for name in names if not (found.folder / f"{name}{shard.SUFFIX}{DAMAGED}").exists()}
