"""The Triton backend: eager.py's functions for NVIDIA and AMD GPUs, and under TRITON_INTERPRET=1 for a CPU."""

from __future__ import annotations

from fastdpo.eager import add_weight_gradient  # the library's product: nothing to write

_NO_TRITON: str | None = None
try:
    from . import launch
    from .column_mass import column_mass
    from .column_probs import column_probs
    from .compact_gradient import compact_gradient
    from .row_backward import row_backward
    from .row_forward import row_forward
    from .sequences import pair_sigmoid, sequence_sums
except ImportError as error:  # Triton is an optional dependency
    _NO_TRITON = f"Triton cannot be imported: {error}"

__all__ = [
    "add_weight_gradient",
    "column_mass",
    "column_probs",
    "compact_gradient",
    "pair_sigmoid",
    "row_backward",
    "row_forward",
    "sequence_sums",
    "unavailable",
]

QUEUES = True  # launches return before their work is done


def unavailable() -> str | None:
    """Why this backend cannot run; None if it can."""
    return _NO_TRITON or launch.unavailable()
