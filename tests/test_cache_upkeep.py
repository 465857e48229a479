"""merge, verify, repair and gc."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")


from shard_kit import NAMED, REFERENCE, cache_of, entries, fresh, index_files, joined, small_files, write  # noqa: F401

from fastdpo.cache import (
    CacheError,
    NamedReference,
    Reference,
    journal,
    shard,
)


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
