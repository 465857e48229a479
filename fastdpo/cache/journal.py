"""Which rows the entries of a shard were computed for, so that `verify` can name them when the shard is unreadable.

Each builder appends to a file of its own, one JSON line a shard, before the shard is there. A line that was cut short
is skipped. Nothing else reads it: entries are found by what was scored, whatever row that came from.
"""

from __future__ import annotations

import json
import os
import uuid
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .rows import PARTS

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
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"shard": shard, **o._asdict()}, separators=(",", ":")) + "\n" for o in origins)
            file.flush()
            os.fsync(file.fileno())


def read(folder: Path) -> dict[str, list[Origin]]:
    """name of a shard -> where its entries come from."""
    found: dict[str, list[Origin]] = defaultdict(list)
    for path in folder.glob(f"*{SUFFIX}"):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                about = json.loads(line)
                origin = Origin(**{k: v for k, v in about.items() if k != "shard"})
                if origin not in found[about["shard"]]:
                    found[about["shard"]].append(origin)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
    return dict(found)


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
