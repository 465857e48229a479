"""Which rows the entries of a shard were computed for, so that `verify` can name them when the shard is unreadable.

Each builder appends to a file of its own, one JSON line a shard, before the shard is there. A line that was cut short
is skipped. A second line says that the shard was written, a third that it was taken out of use; one that was written,
not taken out and is not there has been lost. Nothing else reads it: entries are found by what was scored, whatever row
that came from.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .rows import PARTS
from .shard import is_name

SUFFIX = ".rows.jsonl"
_SHOWN = 1000


class Origin(NamedTuple):
    """Where entries `first`, `first` + 1, ... of a shard come from."""

    first: int
    source: str  # the data's name
    rows: list[int]
    parts: list[int]  # indices into rows.PARTS


class Journal:
    """What one builder writes into a folder of shards."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{uuid.uuid4().hex}{SUFFIX}"

    def add(self, shard: str, origins: Iterable[Origin]) -> None:
        """Record where the entries of a shard come from. On disk once this returns."""
        self._append([{"shard": shard, **origin._asdict()} for origin in origins])

    def written(self, *shards: str) -> None:
        """Record that shards are there."""
        self._append([{"written": shard} for shard in shards])

    def retired(self, *shards: str) -> None:
        """Record that shards are to be there no more."""
        self._append([{"retired": shard} for shard in shards])

    def _append(self, lines: list[dict[str, Any]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())


def read(folder: Path) -> dict[str, list[Origin]]:
    """name of a shard -> where its entries come from."""
    found: dict[str, list[Origin]] = defaultdict(list)
    for line in _lines(folder):
        with contextlib.suppress(TypeError, KeyError):
            found[str(line["shard"])].append(Origin(**{k: v for k, v in line.items() if k != "shard"}))
    return dict(found)


def expected(folder: Path) -> set[str]:
    """Names of shards that were written and not taken out of use."""
    written: set[str] = set()
    retired: set[str] = set()
    for line in _lines(folder):
        written |= {str(line["written"])} if "written" in line else set()
        retired |= {str(line["retired"])} if "retired" in line else set()
    return set(filter(is_name, written - retired))


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    """What all journals of a folder say, each line once: a merge of caches copies them."""
    seen: set[str] = set()
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        with contextlib.suppress(FileNotFoundError):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                if line in seen:
                    continue
                seen.add(line)
                with contextlib.suppress(ValueError):
                    about = json.loads(line)
                    if isinstance(about, dict):
                        yield about


def describe(origins: list[Origin], positions: Iterable[int] | None = None) -> str:
    """Of some entries of a shard, or all: "rows 3 chosen, 8 rejected of pairs.jsonl"."""
    wanted = None if positions is None else set(positions)
    places: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for origin in origins:
        for i, place in enumerate(zip(origin.rows, origin.parts, strict=False)):
            if wanted is None or origin.first + i in wanted:
                places[origin.source].add(place)
    texts = []
    for source, found in sorted(places.items()):
        shown = ", ".join(f"{row} {PARTS[part]}" for row, part in sorted(found)[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        texts.append(f"row{'s' * (len(found) > 1)} {shown}{more} of {source}")
    return "; ".join(texts) or "rows unknown"
