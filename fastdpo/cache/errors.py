"""What the cache raises."""

from __future__ import annotations


class CacheError(ValueError):
    """The cache, or what it was asked for, is not usable; the message names path, value and what was expected."""


class DamagedShard(CacheError):
    """A shard whose bytes are not those that were written."""


class MissingEntry(CacheError, KeyError):
    """Asked for a logp that the cache does not hold; the message names the rows."""

    __str__ = ValueError.__str__  # KeyError would show the repr
