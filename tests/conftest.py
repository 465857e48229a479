"""The suite runs the Triton kernels in Triton's interpreter, all backends with poisoned memory, from one seed."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: a thread that waits must not spin
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from fastdpo.backend import BACKENDS, load


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can run here, on a CPU; the others are skipped with their reason."""
    row = BACKENDS[request.param]
    reason = row.unfit(torch.device("cpu"), row.dtypes[0]) or load(request.param)
    if isinstance(reason, str):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def _seeded_and_poisoned() -> Iterator[None]:
    """New memory is filled with NaN (C++ at::empty too): an element that no kernel wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
