"""The table of backends and the choice among them.

A backend is a module with the functions of eager.py: row_forward, row_backward; column_mass, column_probs,
compact_gradient, add_weight_gradient; sequence_sums, pair_sigmoid; and `unavailable() -> str | None`, the reason why
it cannot run here. Where its launches return before their work is done, it says so: `QUEUES = True`.

One that takes hidden states to row results, kept columns and gradients without logits in memory (kernels/cpu is the
pattern) has `streams() -> bool`, whether that runs here, and stream_forward, stream_backward, stream_gradient, waves
and TileScan, which tiles.py calls.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch


class Backend(NamedTuple):
    """A row of the table."""

    module: str
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...] = ()  # types of torch.device; (): any
    interpreter: str | None = None  # the environment variable that, set to 1, runs its kernels on a CPU, for tests

    def runs_on(self, device: torch.device) -> bool:
        if self.interpreter is not None and device.type == "cpu" and os.environ.get(self.interpreter) == "1":
            return True
        return not self.devices or device.type in self.devices

    def unfit(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot take such tensors; None if it can."""
        if not self.runs_on(device):
            hint = "" if self.interpreter is None else f" ({self.interpreter}=1 runs the kernels on a CPU, for tests)"
            return f"its tensors must be on {' or '.join(self.devices)}, got {device}{hint}"
        if dtype not in self.dtypes:
            return f"it has no kernels for {dtype}, expected one of {', '.join(str(d) for d in self.dtypes)}"
        return None


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# "auto" takes the first whose devices name the tensors' own
BACKENDS = {
    "triton": Backend("fastdpo.gpu", _FLOATS, devices=("cuda",), interpreter="TRITON_INTERPRET"),  # AMD's too are cuda
    "cpu": Backend("fastdpo.cpu", _FLOATS, devices=("cpu",)),
    "eager": Backend("fastdpo.eager", (*_FLOATS, torch.float64)),
}


@functools.cache
def load(name: str) -> ModuleType | str:
    """The backend's module, or the reason why it cannot run on this machine."""
    try:
        module = importlib.import_module(BACKENDS[name].module)
    except ImportError as error:
        return str(error)
    return module.unavailable() or module


def choose(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend for tensors of this device and dtype.

    Raises:
        RuntimeError: a backend asked for by name that cannot run here, or not on this device or dtype.
    """
    if name != "auto":
        found = BACKENDS[name].unfit(device, dtype) or load(name)
        if isinstance(found, str):
            raise RuntimeError(f"backend={name!r} cannot run: {found}")
        return found
    if dtype != torch.float64:  # by design: the eager kernels are the float64 implementation
        preferred = next((name for name, row in BACKENDS.items() if device.type in row.devices), None)
        if preferred is None:
            found = f"none has kernels for {device.type}"
        else:
            found = BACKENDS[preferred].unfit(device, dtype) or load(preferred)
        if not isinstance(found, str):
            return found
        _warn_once(preferred, found)
    eager = load("eager")
    assert isinstance(eager, ModuleType)
    return eager


@functools.cache
def _warn_once(name: str | None, reason: str) -> None:
    what = "no backend fits" if name is None else f"the {name!r} backend is not available"
    warnings.warn(
        f"fastdpo: {what} ({reason}); using the slower eager backend instead. `fastdpo doctor` says more.",
        RuntimeWarning,
        stacklevel=2,
    )
