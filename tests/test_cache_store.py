"""Shards and manifest: what was written is what is read, or there is an error; never another number."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq
from shard_kit import NAMED, REFERENCE, cache_of, entries, fresh, joined, write

from fastdpo.cache import (
    CacheError,
    DamagedShard,
    MissingEntry,
    NamedReference,
    ReferenceCache,
    shard,
)
from fastdpo.cache import index as index_module


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


def test_what_is_written_is_on_disk_before_it_has_its_name_and_the_name_before_we_return(tmp_path, monkeypatch):
    from fastdpo.cache import files
    from fastdpo.cache.journal import Journal

    events, real = [], {name: getattr(os, name) for name in ("fsync", "replace", "link")}

    def fsync(descriptor):
        status = os.fstat(descriptor)
        events.append("folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes")
        real["fsync"](descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("replace", "link"):
        monkeypatch.setattr(os, name, lambda *paths, name=name: (events.append(name), real[name](*paths)))
    files.write(tmp_path / "a", b"four")
    files.write_new(tmp_path / "b", b"five!")
    assert events == ["4 bytes", "replace", "folder", "5 bytes", "link", "folder"]
    events.clear()
    files.write(tmp_path / "a", b"six", sync=False)
    assert events == ["replace"]
    Journal(tmp_path / "shards").written("shard")
    assert events == ["replace", "20 bytes"]
