"""One shard: an immutable Parquet file whose name is the SHA-256 of its bytes.

Columns: key fixed_size_binary(16), logp float64, count int32 and, where asked for, token_logps list<float32>. Pages
carry checksums, for whoever reads the file; but a Parquet footer and page headers carry none, so here the name is
what is checked: every byte of the file is under it.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from . import files
from .errors import CacheError, DamagedShard
from .key import KEY_BYTES

SUFFIX = ".parquet"
_NAME = re.compile("[0-9a-f]{64}")
_METADATA = b"fastdpo"
_SCHEMA = {
    "key": pa.binary(KEY_BYTES),
    "logp": pa.float64(),
    "count": pa.int32(),
    "token_logps": pa.list_(pa.field("element", pa.float32())),
}


@dataclass(frozen=True)
class Shard:
    """n entries of one reference."""

    keys: np.ndarray  # uint8 [n, 16]
    logp: np.ndarray  # float64 [n], sums over the counted tokens
    counts: np.ndarray  # int32 [n], counted tokens
    token_logps: list[np.ndarray] | None  # n of float32 [count]
    replaces: tuple[str, ...] = ()  # names of shards whose entries are all in this one, or are to be forgotten

    def __len__(self) -> int:
        return len(self.logp)


def encode(reference: str, shard: Shard) -> tuple[str, bytes]:
    """(name, bytes of the file) of a shard of the reference with this id; another name each time, so that what one
    shard replaces is never another that was written later.

    Raises:
        CacheError: an entry is not finite; a count or logp that is not that of the token logps.
    """
    if not np.isfinite(shard.logp).all():
        raise CacheError(f"logp: expected finite numbers, got {shard.logp[~np.isfinite(shard.logp)][0]}")
    keys = pa.py_buffer(np.ascontiguousarray(shard.keys, np.uint8))
    columns = {
        "key": pa.FixedSizeBinaryArray.from_buffers(_SCHEMA["key"], len(shard), [None, keys]),
        "logp": pa.array(shard.logp, pa.float64()),
        "count": pa.array(shard.counts, pa.int32()),
    }
    if shard.token_logps is not None:
        lengths = np.array([len(row) for row in shard.token_logps], np.int64)
        if not _sums(shard.logp, shard.counts, lengths, np.concatenate([np.empty(0, np.float32), *shard.token_logps])):
            raise CacheError("token_logps: expected `counts` of them each, with sums `logp`")
        offsets = np.cumsum([0, *map(len, shard.token_logps)]).astype(np.int32)
        values = np.concatenate([np.empty(0, np.float32), *shard.token_logps]).astype(np.float32)
        columns["token_logps"] = pa.ListArray.from_arrays(offsets, values, type=_SCHEMA["token_logps"])
    about = {"format": 1, "reference": reference, "replaces": shard.replaces, "nonce": uuid.uuid4().hex}
    table = pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(about).encode()})
    sink = pa.BufferOutputStream()
    # Keys are random bits and logps nearly so: nothing to compress
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_page_checksum=True)
    data = sink.getvalue().to_pybytes()
    return hashlib.sha256(data).hexdigest(), data


def is_name(name: str) -> bool:
    """Whether a file of this name can be a shard: no other is looked for or deleted because a file says so."""
    return _NAME.fullmatch(name) is not None


def save(folder: Path, name: str, data: bytes) -> None:
    """Write what `encode` gave; it is there whole or not at all."""
    files.write(folder / f"{name}{SUFFIX}", data)


def read(path: Path, reference: str, *, tokens: bool = False) -> Shard:
    """Read one shard, every byte checked.

    Args:
        path: its file.
        reference: id of the reference that it must belong to.
        tokens: keep token_logps too; else they are None if there are none, and empty if there are.

    Raises:
        DamagedShard: the bytes are not those that were written, or are no shard of this reference.
        FileNotFoundError: no such file.
    """
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != path.stem:
        raise DamagedShard(f"{path}: damaged: its {len(data):,} bytes do not hash to its name")
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        about = json.loads(file.metadata.metadata[_METADATA])
        if about["format"] != 1 or about["reference"] != reference:
            raise DamagedShard(f"{path}: a shard of format {about['format']} and reference {about['reference']}")
        for old in about["replaces"]:
            if not is_name(old):
                raise DamagedShard(f"{path}: replaces {old!r}, expected the name of a shard")
        schema = {field.name: field.type for field in file.schema_arrow}
        has_tokens = "token_logps" in schema
        expected = {k: v for k, v in _SCHEMA.items() if k != "token_logps" or has_tokens}
        if schema != expected:
            raise DamagedShard(f"{path}: has columns {schema}, expected {expected}")
        table = file.read().combine_chunks()
        shard = Shard(
            _keys(table["key"]),
            table["logp"].to_numpy(),
            table["count"].to_numpy(),
            _tokens(table["token_logps"]) if tokens and has_tokens else [] if has_tokens else None,
            tuple(about["replaces"]),
        )
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CacheError):
            raise
        raise DamagedShard(f"{path}: not a shard: {error}") from None
    if has_tokens and not all(
        _sums(shard.logp, shard.counts, np.diff(chunk.offsets.to_numpy()), chunk.flatten().to_numpy())
        for chunk in table["token_logps"].chunks
    ):
        raise DamagedShard(f"{path}: holds a logp or count that is not that of its token logps")
    if any(table[name].null_count for name in table.column_names) or not np.isfinite(shard.logp).all():
        raise DamagedShard(f"{path}: holds a logp that is missing or not finite")
    return shard


def _sums(logp: np.ndarray, counts: np.ndarray, lengths: np.ndarray, values: np.ndarray) -> bool:
    """Whether entries have `counts` token logps each, and they add up to `logp`; `values`: of all, in a row."""
    if len(logp) != len(lengths) or not (counts == lengths).all() or not np.isfinite(values).all():
        return False
    entry = np.repeat(np.arange(len(lengths)), lengths)
    sums = np.bincount(entry, weights=values, minlength=len(lengths))
    return bool((np.abs(sums - logp) <= 1e-9 * np.maximum(1.0, np.abs(logp))).all())


def _keys(column: pa.ChunkedArray) -> np.ndarray:
    parts = [np.empty((0, KEY_BYTES), np.uint8)]
    for chunk in column.chunks:
        if len(chunk):
            rows = np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, KEY_BYTES)
            parts.append(rows[chunk.offset : chunk.offset + len(chunk)])
    return np.concatenate(parts)


def _tokens(column: pa.ChunkedArray) -> list[np.ndarray]:
    rows: list[np.ndarray] = []
    for chunk in column.chunks:
        if len(chunk):
            offsets = chunk.offsets.to_numpy()
            rows += np.split(chunk.flatten().to_numpy(), offsets[1:-1] - offsets[0])
    return rows
