"""The table of backends and the choice among them.

A backend is a module with the functions of eager.py: row_forward, row_backward; column_mass, column_probs,
compact_gradient, add_weight_gradient; sequence_sums, pair_sigmoid; and `unavailable() -> str | None`, the reason why
it cannot run here. It may have `stream_forward`, `stream_backward` and `stream_gradient` (tiles.py), which take hidden
states to row results, kept columns and gradients without logits in memory, and then has `streams() -> bool`, whether
they run here. Where its launches return before their work is done, it says so: `QUEUES = True`.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

import torch

BACKEND_MODULES = {"triton": "fastdpo.gpu", "cpu": "fastdpo.cpu", "eager": "fastdpo.eager"}
DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "eager": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}


@functools.cache
def load(name: str) -> ModuleType | str:
    """The backend's module, or the reason why it cannot run on this machine."""
    try:
        module = importlib.import_module(BACKEND_MODULES[name])
    except ImportError as error:
        return str(error)
    return module.unavailable() or module


def choose(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend for tensors of this device and dtype.

    Raises:
        RuntimeError: a backend asked for by name that cannot run here, or not on this device or dtype.
    """
    if name != "auto":
        reason = _unfit(name, device, dtype)
        if reason:
            raise RuntimeError(f"backend={name!r} cannot run: {reason}")
        return _module(name)
    if dtype == torch.float64:  # by design: the eager kernels are the float64 implementation
        return _module("eager")
    preferred = "cpu" if device.type == "cpu" else "triton"
    reason = _unfit(preferred, device, dtype)
    if reason is None:
        return _module(preferred)
    _warn_once(preferred, reason)
    return _module("eager")


def _module(name: str) -> ModuleType:
    module = load(name)
    assert isinstance(module, ModuleType)
    return module


def _unfit(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if name == "cpu" and device.type != "cpu":
        return f"its tensors must be on the CPU, got {device}"
    if name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "its tensors must be on a GPU, got cpu (TRITON_INTERPRET=1 runs the kernels on a CPU, for tests)"
    if name == "triton" and device.type not in ("cuda", "cpu"):
        return f"its tensors must be on an NVIDIA or AMD GPU, got {device}"
    if dtype not in DTYPES[name]:
        return f"it has no kernels for {dtype}, expected one of {', '.join(str(d) for d in DTYPES[name])}"
    module = load(name)
    return module if isinstance(module, str) else None


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(
        f"fastdpo: the {name!r} backend is not available ({reason}); using the slower eager backend instead. "
        "`fastdpo doctor` says more.",
        RuntimeWarning,
        stacklevel=2,
    )
