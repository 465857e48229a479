"""Reference logps, computed once and used across epochs, runs, losses and machines. See docs/cache.md."""

from .errors import CacheError, DamagedShard, MissingEntry
from .key import Reference, Sequence
from .manifest import NamedReference
from .model import ReferenceModel
from .options import BuildReport
from .store import Entries, ReferenceCache

__all__ = [
    "BuildReport",
    "CacheError",
    "DamagedShard",
    "Entries",
    "MissingEntry",
    "NamedReference",
    "Reference",
    "ReferenceCache",
    "ReferenceModel",
    "Sequence",
]
