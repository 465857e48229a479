"""What an entry is found by: a hash of the reference and of exactly what it scored.

    key = BLAKE2b-128(reference id, prior or not, T, ids int32 [T], mask [T] as bits)

Nothing else is in it: neither beta nor the loss, nor the data set, the row, the batch or the machine. max_length,
truncation side, chat template and tokenizer are, through the ids and the mask that they make.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

KEY_BYTES = 16
_PERSON = b"fastdpo key v1"


@dataclass(frozen=True)
class Reference:
    """Which function of token ids the logps are: a model and how its logits are read."""

    fingerprint: str  # of weights, architecture and adapters: cache/fingerprint.py
    dtype: str  # the weights', as "float32"
    autocast: str | None  # the dtype of the products, where that is another
    temperature: float
    softcap: float | None
    logit_scale: float

    @property
    def rounding(self) -> float:
        """How far apart two scorings of one sequence may be, relative to its logp: batches and machines differ."""
        return {"float16": 2e-3, "bfloat16": 2e-2}.get(self.autocast or self.dtype, 1e-5)

    @functools.cached_property
    def id(self) -> str:
        """32 hex digits; also the name of the folder of its shards."""
        canonical = json.dumps(asdict(self), sort_keys=True).encode()
        return hashlib.blake2b(canonical, digest_size=16, person=_PERSON).hexdigest()


class Sequence(NamedTuple):
    """One prompt and completion, as scored."""

    ids: np.ndarray  # int32 [T]
    mask: np.ndarray  # bool [T], True where the token is the completion's
    prior: bool = False  # the completion alone: the log-probability of it given nothing

    @property
    def counted(self) -> np.ndarray:
        """bool [T-1]: which of the predictions of ids[1:] count. Nothing predicts ids[0]."""
        return self.mask[1:]

    def key(self, reference: Reference) -> bytes:
        """16 bytes."""
        digest = hashlib.blake2b(bytes.fromhex(reference.id), digest_size=KEY_BYTES, person=_PERSON)
        digest.update(struct.pack("<?q", self.prior, len(self.ids)))
        digest.update(self.ids.astype("<i4", copy=False).tobytes())
        digest.update(np.packbits(self.mask).tobytes())
        return digest.digest()


def as_array(keys: list[bytes]) -> np.ndarray:
    """Keys as uint8 `[n, 16]`."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def halves(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys uint8 `[n, 16]` as two uint64 `[n]`, which sort as the bytes do."""
    words = np.ascontiguousarray(keys).view(">u8").astype(np.uint64)
    return words[:, 0], words[:, 1]
