"""Same inputs, same bits: run after run, and whatever the number of threads."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastdpo
from fastdpo.backend import load

CASES: dict[str, dict[str, Any]] = {
    "compact": {"grad_tol": 2.0**-8},
    "exact, recomputed": {"grad_tol": 0, "workspace_mb": 0.1},
    "exact, kept": {"grad_tol": 0},
}
BACKENDS = [name for name in ("cpu", "triton") if not isinstance(load(name), str)]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def digest(backend: str, dtype: torch.dtype, keywords: dict[str, Any]) -> str:
    """Of loss, token logps and the gradients of hidden, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    rows, width, vocab = (9, 16, 257) if backend == "triton" else (300, 64, 5003)
    hidden = torch.randn(4, rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(vocab, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (4, rows), generator=generator)
    out = fastdpo.linear_dpo_loss(hidden, weight, labels, bias=bias, backend=backend, stats=("entropy",), **keywords)
    out.loss.backward()
    parts = (out.loss, out.stats.logps, out.stats.entropy, hidden.grad, weight.grad, bias.grad)
    found = hashlib.sha256()
    for part in parts:
        found.update(part.detach().float().contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_ten_runs(backend: str, case: str) -> None:
    dtype = torch.float16 if backend == "triton" else torch.bfloat16
    runs = 2 if backend == "triton" else 10
    assert len({digest(backend, dtype, CASES[case]) for _ in range(runs)}) == 1


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no C++ compiler")
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_threads(case: str, threads: None) -> None:
    """bf16: the kernels' sums have a fixed order; the products are brgemm's, of one thread each, or mm's over rows."""
    found = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.add(digest("cpu", torch.bfloat16, CASES[case]))
    assert len(found) == 1


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no C++ compiler")
def test_another_process() -> None:
    code = "import test_determinism as t, torch; print(t.digest('cpu', torch.bfloat16, t.CASES['compact']))"
    here = digest("cpu", torch.bfloat16, CASES["compact"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=__file__.rpartition("/")[0])
    assert done.stdout.strip() == here, done.stderr
