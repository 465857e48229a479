"""Look-up: the index file, and entries that several shards hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("pyarrow")


from shard_kit import NAMED, REFERENCE, cache_of, entries, fresh, index_files, joined, small_files, write  # noqa: F401

from fastdpo.cache import (
    CacheError,
    MissingEntry,
    shard,
)
from fastdpo.cache import index as index_module
from fastdpo.cache.index import Index
from fastdpo.cache.key import KEY_BYTES


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
