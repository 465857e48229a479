"""Whoever can write to a cache's folder leads nobody out of it: names with paths and links are neither read, written
nor deleted through. Checksums do not help there: the attacker of these tests makes them anew."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_kit import NAMED, REFERENCE, cache_of, entries, index_files, small_files, write  # noqa: F401

from fastdpo.cache import CacheError, DamagedShard, MissingEntry, ReferenceCache, journal, manifest, shard, upkeep
from fastdpo.cache.options import BuildOptions

OURS, THEIRS = entries(3), entries(20, seed=1, tokens=True)


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    """tmp_path/cache; its shards/ID/../../../outside is the other fixture."""
    return cache_of(tmp_path / "cache", OURS)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A shard that would do, and files under names that the cache's code would append its suffixes to."""
    folder = tmp_path / "outside"
    write(folder, THEIRS)
    for suffix in (".parquet", ".arrow", ".json", ".0.claim", ".rows.jsonl", ".tmp", ""):
        (folder / f"elsewhere{suffix}").write_text("{}")
        os.utime(folder / f"elsewhere{suffix}", (0, 0))
    (folder / "empty").mkdir()
    return folder


def state(folder: Path) -> dict[str, Any]:
    """Of every file its bytes and time, and those of the folders."""
    every = [folder, *folder.rglob("*")]
    return {str(path): (path.is_dir() or path.read_bytes(), path.stat().st_mtime) for path in every}


def operations(cache: ReferenceCache) -> dict[str, Any]:
    return {
        "reference": lambda: cache.reference("it"),
        "references": lambda: cache.references,
        "lookup": lambda: cache.lookup(OURS.keys, "it"),
        "theirs": lambda: cache.lookup(THEIRS.keys, "it"),
        "info": cache.info,
        "verify": cache.verify,
        "build": lambda: cache.builder(None, None, {}, "it", BuildOptions()),
        "repair": lambda: upkeep.repair(cache.path, REFERENCE),
        "merge": cache.merge,
        "dry_run": lambda: cache.gc(dry_run=True),
        "gc": cache.gc,
        "drop": lambda: cache.gc(["it"]),
    }


def everything(path: Path) -> None:
    """All that can be done with a cache, as far as it is not refused."""
    for name in operations(ReferenceCache(path)):
        with contextlib.suppress(CacheError, AttributeError if name == "build" else CacheError):
            operations(ReferenceCache(path))[name]()


def paths(outside: Path, above: int) -> list[str]:
    return [f"{'../' * above}outside/elsewhere", str(outside / "elsewhere")]


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("field", ["name", "id", "fingerprint", "model", "tokenizer", "vocabulary"])
def test_a_manifest(cache: ReferenceCache, outside: Path, field: str, absolute: bool) -> None:
    file = cache.path / "references" / "it.json"
    said, path = json.loads(file.read_text()), paths(outside, above=3)[absolute]
    about = said["reference"] if field == "fingerprint" else said
    about[field] = path
    given = {key: value for key, value in said.items() if key not in ("id", "sha256")}
    named = manifest.NamedReference(**{**given, "reference": manifest.Reference(**said["reference"])})
    said["sha256"] = manifest._checksum(named)
    if field == "fingerprint":
        said["id"] = named.reference.id
    file.write_text(json.dumps(said))
    before = state(outside)
    if field in ("name", "id"):
        with pytest.raises(CacheError, match="does not hash to its id"):
            cache.reference("it")
    elif field == "fingerprint":  # of another reference, which holds nothing
        assert cache.shards(cache.reference("it")).parent == cache.path / "shards"
        with pytest.raises(MissingEntry):
            cache.lookup(THEIRS.keys, "it")
    else:
        np.testing.assert_array_equal(cache.lookup(OURS.keys, "it").logp, OURS.logp)
    everything(cache.path)
    assert state(outside) == before


@pytest.mark.parametrize("absolute", [False, True])
def test_what_a_shard_replaces(cache: ReferenceCache, outside: Path, absolute: bool) -> None:
    """A merge deletes what a shard says that it replaces."""
    folder, path = cache.shards(NAMED), paths(outside, above=3)[absolute]
    part = entries(3, seed=2)
    name = write(
        folder, shard.Shard(*(getattr(part, key) for key in ("keys", "logp", "counts", "token_logps")), (path,))
    )
    before = state(outside)
    with pytest.raises(DamagedShard, match="replaces .*elsewhere', expected the name of a shard"):
        shard.read(folder / f"{name}.parquet", REFERENCE.id)
    assert [finding.where for finding in cache.verify()] == [f"shards/{REFERENCE.id}/{name}.parquet"]
    everything(cache.path)
    assert state(outside) == before


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("what", ["shards", "replaces"])
def test_an_index(
    cache: ReferenceCache,
    outside: Path,
    small_files: None,
    what: str,
    absolute: bool,
) -> None:
    """Its shards' names are where token logps are read."""
    import pyarrow as pa

    more = entries(20, seed=3, tokens=True)
    write(cache.shards(NAMED), more)
    cache.index(NAMED)
    (file,) = index_files(cache)
    table, path = pa.ipc.open_file(file.read_bytes()).read_all(), paths(outside, above=3)[absolute]
    if what == "shards":  # one that would be read
        (theirs,) = (one.stem for one in outside.glob(f"{'?' * 64}.parquet"))
        path = path.replace("elsewhere", theirs)
    about = json.loads(table.schema.metadata[b"fastdpo"])
    about["shards"] = [[path if what == "shards" else n, e, t, [path]] for n, e, t, _ in about["shards"]]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.replace_schema_metadata({b"fastdpo": json.dumps(about)}).schema) as writer:
        writer.write_table(table)
    file.unlink()
    data = sink.getvalue().to_pybytes()
    (file.parent / f"{hashlib.sha256(data).hexdigest()}.arrow").write_bytes(data)
    before = state(outside)
    found = ReferenceCache(cache.path).lookup(more.keys, token_logps=True)
    for got, expected in zip(found.token_logps, more.token_logps or [], strict=True):
        np.testing.assert_array_equal(got, expected)
    everything(cache.path)
    assert state(outside) == before


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("key", ["written", "retired", "shard"])
def test_a_journal(cache: ReferenceCache, outside: Path, key: str, absolute: bool) -> None:
    line = {key: paths(outside, above=3)[absolute], "first": 0, "source": "../../outside", "rows": [0], "parts": [0]}
    gone = {key: f"{paths(outside, above=3)[absolute]}-gone"}
    (cache.shards(NAMED) / f"0{journal.SUFFIX}").write_text(f"{json.dumps(line)}\n{json.dumps(gone)}\n")
    before = state(outside)
    assert cache.verify() == []
    everything(cache.path)
    assert state(outside) == before


LINKS = ["manifest.json", "references", "references/it.json", "references/{id}.json", "shards", "shards/{id}", "index"]
LINKS += ["shards/" + "0" * 32, "shards/{id}/elsewhere.parquet", "index/{id}", "index/any", "claims", "claims/{id}"]
LINKS += ["claims/gc.0.claim", "claims/{id}/upkeep.0.claim", "shards/{id}/0.rows.jsonl", "index/{id}/elsewhere.arrow"]


@pytest.mark.parametrize("link", LINKS)
def test_a_link_that_leads_out(cache: ReferenceCache, outside: Path, link: str) -> None:
    """Also one that came after the cache was opened."""
    path = cache.path / link.format(id=REFERENCE.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.rename(cache.path / "moved")
    path.symlink_to(outside / f"elsewhere{''.join(path.suffixes)}" if path.suffix else outside)
    before = state(outside)
    for name, run in operations(cache).items():
        if name == "repair":  # is not called from elsewhere than build
            continue
        with pytest.raises(CacheError, match=f"{path.name}: a link that leads out of the cache, to .*outside"):
            run()
    with pytest.raises(CacheError, match="a link that leads out"):
        ReferenceCache(cache.path)
    with pytest.raises(CacheError, match="a link that leads out"):
        cache_of(cache.path.with_name("another")).merge([cache.path])
    assert state(outside) == before


def test_a_link_that_stays_inside(cache: ReferenceCache) -> None:
    """And one to the cache itself."""
    (cache.path / "shards").rename(cache.path / "disk")
    (cache.path / "shards").symlink_to("disk")
    link = cache.path.with_name("link")
    link.symlink_to(cache.path)
    cache = ReferenceCache(link)
    assert cache.verify() == [] and cache.gc() == []
    np.testing.assert_array_equal(cache.lookup(OURS.keys).logp, OURS.logp)
