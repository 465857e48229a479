"""Many keys to their entries, all at once; a key that is not there is an error that names its place."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import DamagedShard, MissingEntry
from .index import Index
from .manifest import NamedReference


class Entries(NamedTuple):
    """What n keys hold."""

    logp: np.ndarray  # float64 [n], sums over the counted tokens
    counts: np.ndarray  # int32 [n], counted tokens
    token_logps: list[np.ndarray]  # n of float32 [count], where asked for; else empty


def look_up(
    index: Index,
    about: Callable[[], tuple[Path, NamedReference]],
    keys: np.ndarray,
    places: SequenceOf[str] | None,
    token_logps: bool,
) -> Entries:
    """`ReferenceCache.lookup`, of one index, which is refreshed before a key counts as missing.

    Args:
        about: for the error: (the cache's folder, the reference as it was last built)
    """
    for last_try in (False, True):
        found = index.find(keys)
        there = index.has_tokens(found) if token_logps else found.found
        if there.all():
            try:
                return Entries(found.logp, found.counts, index.token_logps(found) if token_logps else [])
            except (FileNotFoundError, DamagedShard):  # merged meanwhile, or damaged since
                if last_try:
                    raise
        if not last_try:
            index.refresh()
    path, named = about()
    gone = np.flatnonzero(~there)
    names = ", ".join(str(i) if places is None else places[i] for i in gone[:20])
    more = f" and {len(gone) - 20} more" if len(gone) > 20 else ""
    damage = f"; {len(index.damaged)} of its shards are damaged" if index.damaged else ""
    damage += f"; {len(index.conflicts)} of its entries disagree" if index.conflicts else ""
    raise MissingEntry(
        f"{names}{more} of {len(keys)}: not in reference {named.name!r} of {path}{' with token logps' * token_logps}, "
        f"which was last built with max_length {named.max_length}, {named.truncation_mode}, tokenizer "
        f"{named.tokenizer or 'none'}{damage}. Build with this data and these settings first"
    )
