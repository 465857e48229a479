"""The reference cache as a table: opening it, and looking up a batch of keys; beside sqlite and a Python dict.

    python -m benchmarks.cache_lookup [--keys 2000000] [--batch 64] [--shard 65536] [--rounds 5]

Opening is what a new process does before its first look-up, files in the page cache: fastdpo lists its shards, checks
the hash of its index and maps it; sqlite connects; the dict is filled from arrays. Every contender must give the right
logps first.
"""

from __future__ import annotations

import argparse
import sqlite3
import tempfile
import time
from pathlib import Path

import numpy as np

from fastdpo.bench.measure import alternate, machine
from fastdpo.cache import Reference, shard
from fastdpo.cache.index import Index
from fastdpo.cache.key import KEY_BYTES

REFERENCE = Reference("0" * 64, "float32", None, 1.0, None, 1.0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=2_000_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--shard", type=int, default=65536, help="entries in a shard")
    parser.add_argument("--rounds", type=int, default=5)
    return parser


def main() -> None:
    options = _parser().parse_args()

    rng = np.random.default_rng(0)
    keys = rng.integers(0, 256, (options.keys, KEY_BYTES), np.uint8)
    logps = -500 * rng.random(options.keys)
    batches = rng.integers(0, options.keys, (200, options.batch))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for first in range(0, options.keys, options.shard):
            part = slice(first, first + options.shard)
            counts = np.ones(len(logps[part]), np.int32)
            shard.save(
                folder / "shards", *shard.encode(REFERENCE.id, shard.Shard(keys[part], logps[part], counts, None))
            )
        table = sqlite3.connect(folder / "sqlite")
        table.execute("create table logps (key blob primary key, logp real) without rowid")
        table.executemany("insert into logps values (?, ?)", zip(map(bytes, keys), logps.tolist(), strict=True))
        table.commit()
        table.close()
        np.savez(folder / "dict.npz", keys=keys, logps=logps)

        start = time.perf_counter()
        Index(folder / "shards", folder / "index", REFERENCE.id).refresh()
        first_open = time.perf_counter() - start

        def fastdpo() -> Index:
            index = Index(folder / "shards", folder / "index", REFERENCE.id)
            index.refresh()
            return index

        def sqlite() -> sqlite3.Connection:
            connection = sqlite3.connect(folder / "sqlite")
            connection.execute("select count(*) from (select 1 from logps limit 1)").fetchone()
            return connection

        def dictionary() -> dict[bytes, float]:
            arrays = np.load(folder / "dict.npz")
            return dict(zip(map(bytes, arrays["keys"]), arrays["logps"].tolist(), strict=True))

        opened = alternate({"fastdpo": fastdpo, "sqlite": sqlite, "dict": dictionary}, options.rounds)
        index, connection, known = fastdpo(), sqlite(), dictionary()
        query = f"select key, logp from logps where key in ({', '.join('?' * options.batch)})"

        def of_sqlite(batch: np.ndarray) -> np.ndarray:
            found = dict(connection.execute(query, [bytes(key) for key in keys[batch]]))
            return np.array([found[bytes(key)] for key in keys[batch]])

        lookups = {
            "fastdpo": lambda batch: index.find(keys[batch]).logp,
            "sqlite": of_sqlite,
            "dict": lambda batch: np.array([known[bytes(key)] for key in keys[batch]]),
        }
        for name, look in lookups.items():
            for batch in batches:
                assert (look(batch) == logps[batch]).all(), f"{name}: a wrong logp; its time is not reported"
        assert not index.find(~keys[batches[0]]).found.any()
        times = alternate(
            {n: lambda look=look: [look(batch) for batch in batches] for n, look in lookups.items()}, options.rounds
        )
    print(f"{options.keys:,} keys in shards of {options.shard:,}; {machine()}\n")
    print(f"| | open, ms | {options.batch} keys, ms |\n|---|---|---|")
    for name in lookups:
        print(f"| {name} | {1e3 * opened[name]:.1f} | {1e3 * times[name] / len(batches):.3f} |")
    print(f"\nThe first opening, which reads all shards and writes the index: {1e3 * first_open:.0f} ms")


if __name__ == "__main__":
    main()
