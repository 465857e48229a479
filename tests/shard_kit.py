"""What the tests of shards, index and upkeep share: made entries in a cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")


from fastdpo.cache import (
    NamedReference,
    Reference,
    ReferenceCache,
    journal,
    shard,
)
from fastdpo.cache import index as index_module
from fastdpo.cache.key import KEY_BYTES

REFERENCE = Reference("f" * 64, "float32", None, 1.0, None, 1.0)


NAMED = NamedReference("it", REFERENCE, "model", "", None, None, 1024, "keep_start", False, False)


def entries(count: int, seed: int = 0, tokens: bool = False) -> shard.Shard:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 9, count).astype(np.int32)
    token_logps = [-rng.random(n, np.float32) for n in counts] if tokens else None
    logp = np.array([row.sum(dtype=np.float64) for row in token_logps]) if token_logps else -100 * rng.random(count)
    return shard.Shard(rng.integers(0, 256, (count, KEY_BYTES), np.uint8), logp, counts, token_logps)


def write(folder: Path, part: shard.Shard) -> str:
    name, data = shard.encode(REFERENCE.id, part)
    shard.save(folder, name, data)
    return name


def cache_of(path: Path, *parts: shard.Shard) -> ReferenceCache:
    cache = ReferenceCache(path)
    cache._manifest.create()
    cache._manifest.put(NAMED, overwrite=False)
    for part in parts:
        name = write(cache.shards(NAMED), part)
        origin = journal.Origin(0, "pairs", list(range(len(part))), [0] * len(part))
        journal.Journal(cache.shards(NAMED)).add(name, [origin])
    return cache


def fresh(cache: ReferenceCache) -> ReferenceCache:
    return ReferenceCache(cache.path)


def joined(*parts: shard.Shard) -> np.ndarray:
    return np.concatenate([part.keys for part in parts])


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(index_module, "_WORTH_A_FILE", 10)


def index_files(cache: ReferenceCache) -> list[Path]:
    return list((cache.path / "index").glob("*/*.arrow"))
