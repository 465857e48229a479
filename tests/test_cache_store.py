"""Shards and look-up: what was written is what is read, or there is an error; never another number."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

from fastdpo.cache import (
    CacheError,
    DamagedShard,
    MissingEntry,
    NamedReference,
    Reference,
    ReferenceCache,
    journal,
    shard,
)
from fastdpo.cache import index as index_module
from fastdpo.cache.index import Index
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


# --- a shard ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("count", [0, 1, 700])
def test_round_trip(tmp_path, count, tokens):
    part = entries(count, tokens=tokens)
    name = write(tmp_path, part)
    path = tmp_path / f"{name}.parquet"
    assert write(tmp_path, part) != name, "never the same name"
    again = shard.read(path, REFERENCE.id, tokens=True)
    for column in ("keys", "logp", "counts"):
        np.testing.assert_array_equal(getattr(again, column), getattr(part, column))
    if tokens:
        assert len(again.token_logps) == count
        for mine, theirs in zip(again.token_logps, part.token_logps, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    table = pq.read_table(path, page_checksum_verification=True)
    assert {"key", "logp", "count"} <= set(table.column_names)
    assert table.schema.field("key").type == pa.binary(16)
    assert table.schema.field("logp").type == pa.float64()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logp_that_is_not_finite_is_never_stored(tmp_path, bad):
    part = entries(3)
    part.logp[1] = bad
    with pytest.raises(CacheError, match="logp: expected finite numbers"):
        shard.encode(REFERENCE.id, part)


def regions(path: Path) -> dict[str, list[int]]:
    """Bytes of every part of a Parquet file: magic, pages of each column (header, data), footer, its length."""
    file, size = pq.ParquetFile(path), path.stat().st_size
    footer = size - 8 - int.from_bytes(path.read_bytes()[-8:-4], "little")
    found = {"magic at the start": range(4), "magic at the end": range(size - 4, size)}
    found |= {"footer": range(footer, size - 8), "length of the footer": range(size - 8, size - 4)}
    group = file.metadata.row_group(0)
    for i in range(group.num_columns):
        column = group.column(i)
        begin, end = column.data_page_offset, column.data_page_offset + column.total_compressed_size
        found[f"page header of {column.path_in_schema}"] = range(begin, begin + 20)
        found[f"page of {column.path_in_schema}"] = range(begin + 40, end)
    return {name: random.Random(0).sample(list(bytes_), min(6, len(bytes_))) for name, bytes_ in found.items()}


@pytest.mark.parametrize("indexed", [False, True])
def test_every_flipped_byte_is_found_and_no_wrong_logp_returned(tmp_path, monkeypatch, indexed):
    if indexed:
        monkeypatch.setattr(index_module, "_WORTH_A_FILE", 1)
    part, other = entries(50, tokens=True), entries(20, seed=1, tokens=True)
    cache = cache_of(tmp_path, part, other)
    fresh(cache).lookup(joined(part, other))
    (path,) = (p for p in cache.shards(NAMED).glob("*.parquet") if len(shard.read(p, REFERENCE.id)) == 50)
    right = path.read_bytes()
    places = regions(path)
    assert len(places) == 12, "4 columns, 4 other parts"
    damages = [(name, at) for name, found in places.items() for at in found]
    damages += [("cut", length) for length in (0, 1, len(right) // 2, len(right) - 1)]
    for name, at in damages:
        wrong = bytearray(right[:at] if name == "cut" else right)
        if name != "cut":
            wrong[at] ^= 1 << (at % 8)
        path.write_bytes(wrong)
        found = fresh(cache).verify()
        assert [finding.where for finding in found] == [str(path.relative_to(tmp_path))], name
        assert found[0].rows.startswith("rows 0 chosen, 1 chosen, "), "says whom it concerns"
        assert found[0].rows.endswith("49 chosen of pairs")
        reader = fresh(cache)
        np.testing.assert_array_equal(reader.lookup(other.keys).logp, other.logp)
        if indexed:  # what was read from it when it was right
            np.testing.assert_array_equal(reader.lookup(part.keys).logp, part.logp)
        else:
            with pytest.raises(MissingEntry, match="and 30 more of 50: .* 1 of its shards are damaged"):
                reader.lookup(part.keys)
        with pytest.raises((MissingEntry, DamagedShard)):
            reader.lookup(part.keys, token_logps=True)
    path.write_bytes(right)
    assert cache.verify() == []


def test_what_a_reader_finds_only_later_is_checked_too(tmp_path):
    """Token logps are read when they are asked for, perhaps long after the cache was opened."""
    part = entries(50, tokens=True)
    cache = cache_of(tmp_path, part)
    assert len(cache.lookup(part.keys[:3], token_logps=True).token_logps) == 3
    path = next(cache.shards(NAMED).glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-50] + b"x" + path.read_bytes()[-49:])
    with pytest.raises(DamagedShard):
        cache.lookup(part.keys[:3], token_logps=True)


@pytest.mark.parametrize("content", ["pickle", "text", "another reference", "wrong columns", "a link"])
def test_what_is_no_shard_is_not_read(tmp_path, content):
    import hashlib

    part = entries(3)
    cache = cache_of(tmp_path, part)
    folder = cache.shards(NAMED)

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    if content == "pickle":
        data = pickle.dumps(Bomb())
    elif content == "text":
        data = b"PAR1 no"
    elif content == "another reference":
        _, data = shard.encode("0" * 32, entries(3, seed=1))
    elif content == "wrong columns":
        sink = pa.BufferOutputStream()
        about = {b"fastdpo": json.dumps({"format": 1, "reference": REFERENCE.id, "replaces": []}).encode()}
        pq.write_table(pa.table({"key": ["a"], "logp": [0.0]}).replace_schema_metadata(about), sink)
        data = sink.getvalue().to_pybytes()
    else:
        outside = tmp_path / "outside"
        outside.write_bytes(b"secret")
        (folder / f"{'0' * 64}.parquet").symlink_to(outside)
        data = b""
    if data:
        (folder / f"{hashlib.sha256(data).hexdigest()}.parquet").write_bytes(data)
    np.testing.assert_array_equal(fresh(cache).lookup(part.keys).logp, part.logp)
    assert len(cache.verify()) == 1
    assert not (tmp_path / "exploded").exists()


# --- look-up ---------------------------------------------------------------------------------------------------------


def test_lookup_of_a_batch_and_of_none(tmp_path):
    parts = [entries(300, seed) for seed in range(3)]
    cache = cache_of(tmp_path, *parts)
    order = np.random.default_rng(5).permutation(900)
    found = cache.lookup(joined(*parts)[order])
    np.testing.assert_array_equal(found.logp, np.concatenate([part.logp for part in parts])[order])
    np.testing.assert_array_equal(found.counts, np.concatenate([part.counts for part in parts])[order])
    assert len(cache.lookup(np.empty((0, KEY_BYTES), np.uint8)).logp) == 0
    twice = cache.lookup(parts[0].keys[[4, 4, 4]])
    assert (twice.logp == parts[0].logp[4]).all()
    with pytest.raises(CacheError, match="keys: expected uint8"):
        cache.lookup(np.zeros((3, 8), np.uint8))


def test_a_missing_key_raises_and_names_its_place(tmp_path):
    part = entries(5)
    cache = cache_of(tmp_path, part)
    absent = entries(5, seed=1).keys[:1]
    with pytest.raises(MissingEntry, match=r"^1 of 3: not in reference 'it' of .*max_length 1024"):
        cache.lookup(np.concatenate([part.keys[:1], absent, part.keys[1:2]]))
    with pytest.raises(MissingEntry, match="^row 7 rejected of 1"):
        cache.lookup(absent, places=["row 7 rejected"])
    with pytest.raises(MissingEntry, match="with token logps"):
        cache.lookup(part.keys, token_logps=True)
    with pytest.raises(KeyError):
        cache.lookup(absent)


def test_keys_with_equal_first_halves(tmp_path, monkeypatch):
    part = entries(40)
    part.keys[10:30, :8] = part.keys[0, :8]
    part.keys[35] = 255
    for worth in (10**9, 1):
        monkeypatch.setattr(index_module, "_WORTH_A_FILE", worth)
        cache = cache_of(tmp_path / str(worth), part)
        np.testing.assert_array_equal(cache.lookup(part.keys).logp, part.logp)
        absent = part.keys[[0]].copy()
        absent[0, 15] ^= 1
        with pytest.raises(MissingEntry):
            cache.lookup(absent)
        with pytest.raises(MissingEntry):
            cache.lookup(np.full((1, KEY_BYTES), 254, np.uint8))


def test_entries_written_after_opening_are_found(tmp_path):
    first, second = entries(5), entries(5, seed=1)
    cache = cache_of(tmp_path, first)
    cache.lookup(first.keys)
    write(cache.shards(NAMED), second)
    np.testing.assert_array_equal(cache.lookup(joined(first, second)).logp[5:], second.logp)


# --- the index file --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(index_module, "_WORTH_A_FILE", 10)


def index_files(cache: ReferenceCache) -> list[Path]:
    return list((cache.path / "index").glob("*/*.arrow"))


def test_index_is_used_and_grows(tmp_path, small_files, monkeypatch):
    parts = [entries(12, seed) for seed in range(4)]
    cache = cache_of(tmp_path, *parts[:2])
    cache.lookup(parts[0].keys)
    assert len(index_files(cache)) == 1
    reads = []
    read = shard.read
    monkeypatch.setattr(index_module.shard, "read", lambda *a, **k: reads.append(a) or read(*a, **k))
    np.testing.assert_array_equal(fresh(cache).lookup(joined(*parts[:2])).logp[12:], parts[1].logp)
    assert reads == [], "all from the index"
    write(cache.shards(NAMED), entries(3, seed=9))
    fresh(cache).lookup(entries(3, seed=9).keys)
    assert len(reads) == 1 and len(index_files(cache)) == 1, "3 are too few for a new one"
    write(cache.shards(NAMED), parts[2])
    np.testing.assert_array_equal(fresh(cache).lookup(joined(*parts[:3])).logp[24:], parts[2].logp)
    assert len(index_files(cache)) == 2
    reads.clear()
    fresh(cache).lookup(joined(*parts[:3]))
    assert reads == []
    cache.gc()
    assert len(index_files(cache)) == 1


def test_an_index_that_is_damaged_or_forged_is_not_used(tmp_path, small_files):
    part = entries(30)
    cache = cache_of(tmp_path, part)
    cache.lookup(part.keys)
    (path,) = index_files(cache)
    right = path.read_bytes()
    at = right.find(part.logp[np.lexsort(part.keys.T[::-1])][:1].tobytes())
    assert at > 0, "the first logp"
    for place in (0, 100, at, len(right) - 3):
        wrong = bytearray(right)
        wrong[place] ^= 64
        path.write_bytes(wrong)
        np.testing.assert_array_equal(fresh(cache).lookup(part.keys).logp, part.logp)
        path.unlink(missing_ok=True)
    path.write_bytes(right[:500])
    np.testing.assert_array_equal(fresh(cache).lookup(part.keys).logp, part.logp)


def test_an_index_of_shards_that_are_gone_is_not_used(tmp_path, small_files):
    parts = [entries(30, seed) for seed in range(2)]
    cache = cache_of(tmp_path, *parts)
    cache.lookup(parts[0].keys)
    (path,) = (
        p
        for p in cache.shards(NAMED).glob("*.parquet")
        if (shard.read(p, REFERENCE.id).keys[0] == parts[0].keys[0]).all()
    )
    path.unlink()
    for reader in (fresh(cache), cache):
        with pytest.raises(MissingEntry):
            reader.lookup(entries(1, seed=77).keys)
        with pytest.raises(MissingEntry):
            reader.lookup(parts[0].keys)
        np.testing.assert_array_equal(reader.lookup(parts[1].keys).logp, parts[1].logp)


def test_a_folder_that_cannot_be_written_is_read(tmp_path, small_files, monkeypatch):
    part = entries(30)
    cache = cache_of(tmp_path, part)

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(index_module.files, "write", refuse)
    np.testing.assert_array_equal(fresh(cache).lookup(part.keys).logp, part.logp)
    assert index_files(cache) == []


# --- entries that several shards hold --------------------------------------------------------------------------------


def test_entries_that_agree_are_found_once(tmp_path):
    part = entries(10)
    near = replace(part, logp=part.logp * (1 + 1e-7))
    cache = cache_of(tmp_path, part, near)
    assert len(cache.lookup(part.keys).logp) == 10
    findings = cache.verify()
    assert [finding.what for finding in findings] == ["10 duplicate entries: another shard holds them too"] * 2
    assert findings[0].rows.startswith("rows 0 chosen, 1 chosen")


@pytest.mark.parametrize("files", [1, 10**9])
def test_entries_that_disagree_are_not_found(tmp_path, monkeypatch, files):
    monkeypatch.setattr(index_module, "_WORTH_A_FILE", files)
    part = entries(10)
    logp = part.logp.copy()
    logp[3] -= 0.1
    cache = cache_of(tmp_path, part)
    cache.lookup(part.keys)
    write(cache.shards(NAMED), replace(part, logp=logp))
    write(cache.shards(NAMED), shard.Shard(part.keys[3:4], part.logp[3:4], part.counts[3:4], None))
    for _ in range(2):
        reader = fresh(cache)
        with pytest.raises(MissingEntry, match="^3 of 10: .*1 of its entries disagree"):
            reader.lookup(part.keys)
        assert len(reader.lookup(np.delete(part.keys, 3, axis=0)).logp) == 9
    what = [finding.what for finding in cache.verify()]
    assert sum("1 disagreeing" in text for text in what) == 3
    assert sum("9 duplicate" in text for text in what) == 2


def test_an_entry_with_token_logps_wins(tmp_path, small_files):
    part = entries(12, tokens=True)
    cache = cache_of(tmp_path, replace(part, token_logps=None, logp=part.logp * (1 + 1e-7)))
    cache.lookup(part.keys)
    write(cache.shards(NAMED), part)
    for _ in range(2):
        np.testing.assert_array_equal(fresh(cache).lookup(part.keys).logp, part.logp)
    assert cache.verify() == []
    cache.merge()
    cache.gc()
    np.testing.assert_array_equal(fresh(cache).lookup(part.keys, token_logps=True).logp, part.logp)
    assert len(list(cache.shards(NAMED).glob("*.parquet"))) == 1, "nothing was left of the old one"


@pytest.mark.parametrize("files", [1, 10**9])
@pytest.mark.parametrize("first", [False, True])
def test_an_entry_with_token_logps_that_disagrees_with_one_without_is_not_found(tmp_path, monkeypatch, files, first):
    monkeypatch.setattr(index_module, "_WORTH_A_FILE", files)
    part = entries(12, tokens=True)
    logp = part.logp.copy()
    logp[3] -= 5
    parts = [part, replace(part, token_logps=None, logp=logp)]
    cache = cache_of(tmp_path, parts[first])
    cache.lookup(part.keys)
    write(cache.shards(NAMED), parts[not first])
    for _ in range(2):
        with pytest.raises(MissingEntry, match="^3 of 12: .*1 of its entries disagree"):
            fresh(cache).lookup(part.keys)
    assert [finding.what for finding in cache.verify()] == ["1 disagreeing entries: another shard holds them too"] * 2


# --- merge, gc -------------------------------------------------------------------------------------------------------


def test_merge_puts_shards_together_and_keeps_the_rows(tmp_path):
    parts = [entries(10 + seed, seed, tokens=seed % 2 == 1) for seed in range(6)]
    cache = cache_of(tmp_path, *parts, replace(parts[0], replaces=("0" * 64,)))
    before = fresh(cache).lookup(joined(*parts)).logp
    merged = cache.merge()
    assert (merged.before, merged.after) == (7, 2)
    for reader in (cache, fresh(cache)):
        np.testing.assert_array_equal(reader.lookup(joined(*parts)).logp, before)
        assert len(reader.lookup(parts[1].keys, token_logps=True).token_logps) == 11
    assert cache.verify() == []
    assert cache.merge().before == 2, "nothing more to do"
    for path in cache.shards(NAMED).glob("*.parquet"):
        path.write_bytes(b"")
    rows = " ".join(finding.rows for finding in cache.verify())
    assert rows.count("14 chosen") == 1, "the largest shard's last row"


def test_a_merge_that_was_cut_short_doubles_nothing(tmp_path, monkeypatch):
    parts = [entries(10, seed) for seed in range(3)]
    cache = cache_of(tmp_path, *parts)
    with monkeypatch.context() as patch:
        unlink = Path.unlink

        def interrupted(self, **keywords):
            if self.suffix == ".parquet":
                raise KeyboardInterrupt
            unlink(self, **keywords)

        patch.setattr(Path, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.merge()
    assert len(list(cache.shards(NAMED).glob("*.parquet"))) == 4
    assert cache.verify() == []
    assert len(fresh(cache).lookup(joined(*parts)).logp) == 30
    assert cache.info()[0].entries == 30
    gone = cache.gc(dry_run=True)
    assert len([path for path in gone if path.suffix == ".parquet"]) == 3
    assert cache.gc() == gone
    assert len(fresh(cache).lookup(joined(*parts)).logp) == 30


def test_caches_of_two_machines_become_one(tmp_path):
    parts = [entries(10, seed) for seed in range(3)]
    here, there = cache_of(tmp_path / "here", *parts[:2]), cache_of(tmp_path / "there", *parts[1:])
    for path in here.shards(NAMED).glob("*.parquet"):
        if (shard.read(path, REFERENCE.id).keys[0] == parts[1].keys[0]).all():
            next_path = path
    shutil.copy(next_path, there.shards(NAMED))
    assert here.merge([there.path]).taken == 2, "one is here already"
    np.testing.assert_array_equal(here.lookup(joined(*parts)).logp[20:], parts[2].logp)
    assert here.verify() == []
    other = tmp_path / "other"
    cache_of(other)._manifest.put(
        NamedReference("it", Reference("e" * 64, "float32", None, 1.0, None, 1.0), *tuple(vars(NAMED).values())[2:]),
        True,
    )
    with pytest.raises(CacheError, match="name: 'it' is another reference .*fingerprint was fff"):
        here.merge([other])


@pytest.mark.parametrize("where", ["in one cache", "in the other", "between two"])
def test_merge_refuses_entries_that_disagree_and_loses_none(tmp_path, where):
    part = entries(10)
    wrong = replace(part, logp=part.logp - 1)
    here = cache_of(tmp_path / "here", part, *([wrong] if where == "in one cache" else []))
    there = cache_of(tmp_path / "there", wrong, *([part] if where == "in the other" else []))
    before = sorted(tmp_path.rglob("*.parquet"))
    with pytest.raises(CacheError, match="disagree.*rows 0 chosen, 1 chosen.*of pairs"):
        here.merge([] if where == "in one cache" else [there.path])
    assert sorted(tmp_path.rglob("*.parquet")) == before


def test_repair_leaves_no_tombstone(tmp_path):
    """A shard that is written anew is not one that was taken out of use before, whatever it holds."""
    from fastdpo.cache import upkeep

    part = entries(10)
    cache = cache_of(tmp_path, part, replace(part, logp=part.logp - 1))
    assert len(upkeep.repair(tmp_path, REFERENCE)) == 0
    assert list(cache.shards(NAMED).glob("*.parquet")) == []
    write(cache.shards(NAMED), part)
    np.testing.assert_array_equal(fresh(cache).lookup(part.keys).logp, part.logp)
    assert cache.verify() == []


def test_token_logps_must_be_those_of_the_sum(tmp_path, monkeypatch):
    part = entries(10, tokens=True)
    cache = cache_of(tmp_path, part)
    for wrong in (replace(part, logp=part.logp - 5), replace(part, counts=part.counts + 3)):
        with pytest.raises(CacheError, match="token_logps: expected"):
            write(tmp_path, wrong)
    with monkeypatch.context() as patch:
        patch.setattr(shard, "_sums", lambda *_: True)
        write(cache.shards(NAMED), replace(entries(3, seed=1, tokens=True), logp=np.full(3, -5.0)))
    (finding,) = cache.verify()
    assert "holds a logp or count that is not that of its token logps" in finding.what


def test_verify_finds_shards_that_are_gone(tmp_path):
    parts = [entries(10, seed) for seed in range(2)]
    cache = cache_of(tmp_path, *parts)
    folder = cache.shards(NAMED)
    names = [path.stem for path in folder.glob("*.parquet")]
    journal.Journal(folder).written(*names)
    cache.merge()
    assert cache.verify() == [], "merged is not gone"
    (path,) = folder.glob("*.parquet")
    path.unlink()
    (finding,) = cache.verify()
    assert finding.where.endswith(path.name) and finding.what == "was written, and is gone"
    assert "9 chosen" in finding.rows
    from fastdpo.cache import upkeep

    upkeep.repair(tmp_path, REFERENCE)
    assert cache.verify() == [], "known, and to be scored again"


def test_verify_reads_the_index_files(tmp_path, small_files):
    from fastdpo.cache import upkeep

    part = entries(30)
    cache = cache_of(tmp_path, part)
    cache.lookup(part.keys)
    (path,) = index_files(cache)
    wrong = bytearray(path.read_bytes())
    wrong[500] ^= 1
    path.write_bytes(wrong)
    (finding,) = cache.verify()
    assert finding.where == str(path.relative_to(tmp_path)) and "do not hash to its name" in finding.what
    assert cache.gc(dry_run=True) == [path]
    upkeep.repair(tmp_path, REFERENCE)
    assert cache.verify() == [] and not path.exists()


def test_gc_drops_a_reference(tmp_path):
    cache = cache_of(tmp_path, entries(10))
    assert cache.gc() == []
    with pytest.raises(CacheError, match="'nobody' is not in"):
        cache.gc(["nobody"])
    assert len(cache.gc(["it"])) == 2
    assert cache.references == {}
    assert list((tmp_path / "shards").iterdir()) == []


# --- the manifest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../it", "/etc/passwd", "a/b", "", ".hidden", "a" * 65, 3, "a\n"])
def test_names_cannot_leave_the_folder(tmp_path, name):
    cache = cache_of(tmp_path)
    with pytest.raises(CacheError, match="name: expected letters"):
        cache.reference(name)


def test_a_manifest_that_was_changed_is_refused(tmp_path):
    part = entries(3)
    cache = cache_of(tmp_path, part)
    path = tmp_path / "references" / "it.json"
    right = json.loads(path.read_text())
    for change in ({"temperature": 0.5}, {"fingerprint": "../../elsewhere"}, {"dtype": "bfloat16"}):
        path.write_text(json.dumps({**right, "reference": {**right["reference"], **change}}))
        with pytest.raises(CacheError, match="damaged"):
            fresh(cache).lookup(part.keys)
        assert [finding.where for finding in cache.verify()] == ["references/it.json"]
    for text in ("{", "[]", json.dumps({**right, "id": "../../.."}), json.dumps({**right, "path": "/etc"})):
        path.write_text(text)
        with pytest.raises(CacheError, match="it.json"):
            fresh(cache).lookup(part.keys)
    path.write_text(json.dumps(right))
    (tmp_path / "manifest.json").write_text('{"format": "fastdpo reference logps", "version": 2}')
    with pytest.raises(CacheError, match="expected .*'version': 1.* got .*'version': 2"):
        fresh(cache)


def test_a_manifest_that_is_cut_short_is_written_again(tmp_path):
    part = entries(3)
    cache = cache_of(tmp_path, part)
    for damage in ("cut", "gone"):
        (tmp_path / "manifest.json").write_text('{"form') if damage == "cut" else (tmp_path / "manifest.json").unlink()
        again = fresh(cache)
        np.testing.assert_array_equal(again.lookup(part.keys).logp, part.logp)
        assert [finding.where for finding in again.verify()] == ["manifest.json"]
        again._manifest.create()
        assert again.verify() == []


def test_stray_files_beside_the_names_are_reported_and_in_nobodys_way(tmp_path):
    part = entries(3)
    cache = cache_of(tmp_path, part)
    (tmp_path / "references" / "._it.json").write_text("{}")
    np.testing.assert_array_equal(fresh(cache).lookup(part.keys).logp, part.logp)
    assert [finding.where for finding in cache.verify()] == ["references/._it.json"]


def test_which_reference(tmp_path):
    nowhere, other = ReferenceCache(tmp_path / "none"), ReferenceCache(tmp_path / "other")
    (tmp_path / "other").mkdir()
    for use in ("reference", "info", "verify", "merge", "gc"):
        with pytest.raises(CacheError, match="none: no such folder; `build` makes a cache"):
            getattr(nowhere, use)()
        with pytest.raises(CacheError, match="other: not a cache, it has no manifest.json"):
            getattr(other, use)()
    with pytest.raises(CacheError, match="none: no such folder"):
        cache_of(tmp_path / "c").merge([nowhere.path])
    assert not (tmp_path / "none").exists(), "reading makes no folder"
    cache = cache_of(tmp_path / "cache")
    assert cache.reference().name == cache.reference("it").name == "it"
    cache._manifest.put(NamedReference("b", *tuple(vars(NAMED).values())[1:]), overwrite=False)
    with pytest.raises(CacheError, match="which holds b, it"):
        cache.reference()


def test_a_cache_can_be_moved_and_pickled(tmp_path):
    part = entries(10)
    cache = cache_of(tmp_path / "a", part)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(cache)).lookup(part.keys).logp, part.logp)
    shutil.move(tmp_path / "a", tmp_path / "b")
    np.testing.assert_array_equal(ReferenceCache(tmp_path / "b").lookup(part.keys).logp, part.logp)


def test_files_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    from fastdpo.cache import files

    path = tmp_path / "file"
    files.write(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert not files.write_new(path, b"new")
    link = os.link

    def twice(*names):  # an NFS client that asks again, since the first answer was lost
        link(*names)
        link(*names)

    monkeypatch.setattr(os, "link", twice)
    assert files.write_new(tmp_path / "linked", b"new") and not files.write_new(path, b"new")
    (tmp_path / "linked").unlink()
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    assert not files.write_new(path, b"new")
    assert files.write_new(tmp_path / "another", b"new")
    assert stat.S_ISREG((tmp_path / "another").stat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["another", "file"]


def test_an_index_is_of_one_reference(tmp_path):
    write(tmp_path, entries(3))
    index = Index(tmp_path, None, "0" * 32)
    index.refresh()
    assert len(index) == 0 and len(index.damaged) == 1


def test_a_shard_that_is_made_whole_again_is_read_again(tmp_path):
    part = entries(10)
    cache = cache_of(tmp_path, part)
    (path,) = cache.shards(NAMED).glob("*.parquet")
    right = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(MissingEntry, match="1 of its shards are damaged"):
        cache.lookup(part.keys)
    path.write_bytes(right)
    np.testing.assert_array_equal(cache.lookup(part.keys).logp, part.logp)
