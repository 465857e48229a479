"""How a build is asked for, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .errors import CacheError
from .rows import MAX_LENGTH, check_truncation


class BuildOptions(NamedTuple):
    """How to build: the keywords of `ReferenceCache.build`, where they are explained."""

    max_length: int | None = MAX_LENGTH
    truncation_mode: str = "keep_start"
    prior: bool = False
    token_logps: bool = False
    shard_size: int = 512
    batch_tokens: int = 8192
    source: str = "data"
    replace_name: bool = False
    progress: bool = True

    def check(self) -> BuildOptions:
        """Raise CacheError for a value out of range."""
        check_truncation(self.max_length, self.truncation_mode)
        for name in ("shard_size", "batch_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CacheError(f"{name}: expected an int above 0, got {value!r}")
        return self

    @property
    def parts(self) -> list[int]:
        """Indices into rows.PARTS."""
        return [0, 1, 2, 3] if self.prior else [0, 1]


@dataclass
class BuildReport:
    """What one build found and did, in sequences."""

    name: str  # of the reference
    sequences: int = 0  # that the data asks for
    duplicates: int = 0  # of them, that ask for the same key as an earlier one
    cached: int = 0  # that were there before
    scored: int = 0  # by this builder
    elsewhere: int = 0  # by other builders meanwhile
    empty: int = 0  # without a token to count (the prompt fills max_length): logp 0
    shards: int = 0  # that this builder wrote

    def __str__(self) -> str:
        elsewhere = f", {self.elsewhere} scored by other builders" if self.elsewhere else ""
        empty = f"; {self.empty} have no completion token within max_length" if self.empty else ""
        return (
            f"{self.name}: {self.sequences} sequences: {self.scored} scored, {self.cached} already there{elsewhere}, "
            f"{self.duplicates} duplicates; {self.shards} shards written{empty}"
        )
