"""Same inputs, same bits: run after run, and whatever the number of threads."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from heads import peaked
from torch import Tensor

import fastdpo
from fastdpo import tiles
from fastdpo.backend import load
from fastdpo.compaction import Compact, Sparse
from fastdpo.saved import Exponentials, Saved

# What the backward finds, by the tolerance and the share of the logits that the workspace holds
CASES = {"compact": (2.0**-6, 1.0), "exact, recomputed": (0.0, 0.4), "exact, kept": (0.0, 1.0)}
STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs", "lse")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = [name for name in ("cpu", "triton") if not isinstance(load(name), str)]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def way(saved: Saved) -> str:
    """The case that a forward was."""
    kinds = {type(kept) for *_, kept in saved.tiles}
    if saved.logits is not None or kinds == {Exponentials}:
        return "exact, kept"
    return "exact, recomputed" if kinds == {type(None)} else "compact" if kinds <= {Compact, Sparse} else str(kinds)


def digest(backend: str, dtype: torch.dtype, case: str, products: bool = True) -> str:
    """Of loss, token logps and the gradients of hidden, weight (products: a library's) and bias."""
    rows, width, vocab, sharp = (4, 16, 131, 1.5) if backend == "triton" else (300, 64, 5003, 0.3)
    hidden, weight, labels = peaked(4 * rows, vocab, width, sharp)
    labels %= 97  # the likeliest
    hidden = hidden.view(4, rows, width).to(dtype).requires_grad_()
    weight, bias = (x.to(dtype).requires_grad_() for x in (weight, torch.linspace(-1, 1, vocab)))
    tol, share = CASES[case]
    forward, ways = tiles.forward, []

    def watched(*arguments: Any) -> tuple[list[Tensor], Saved | None]:
        results, saved = forward(*arguments)
        ways.append(way(saved))
        return results, saved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "forward", watched)
        out = fastdpo.linear_dpo_loss(
            *(hidden, weight, labels.view(4, rows)),
            bias=bias,
            backend=backend,
            stats=("entropy", "dropped_mass"),
            grad_tol=tol,
            workspace_mb=share * 4 * rows * vocab * dtype.itemsize / 2**20,
        )
    assert ways == [case]
    out.loss.backward()
    parts = [out.loss, out.stats.logps, out.stats.entropy, out.stats.dropped_mass, bias.grad]
    return hashed([*parts, hidden.grad, weight.grad] if products else parts)


def logits_digest(dtype: torch.dtype) -> str:
    """Of what the row kernels give: token logps, all statistics, and the gradient of logps and entropy."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(300, 5003, generator=generator) * 3).to(dtype).requires_grad_()
    labels = torch.randint(0, 5003, (300,), generator=generator)
    out = fastdpo.token_logps(logits, labels, stats=STATS, backend="cpu")
    grads = torch.linspace(-1, 1, 300)
    return hashed([*out[:6], *torch.autograd.grad([out.logps, out.entropy], logits, [grads, grads.flip(0)])])


def hashed(parts: list[Tensor]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.detach().float().contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_ten_runs(backend: str, case: str) -> None:
    dtype = torch.float16 if backend == "triton" else torch.bfloat16
    assert len({digest(backend, dtype, case) for _ in range(10)}) == 1


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_threads(case: str, dtype: torch.dtype, threads: None) -> None:
    """The kernels' sums have a fixed order, and brgemm's products are of one thread each.

    Not dX and dW in float32: MKL divides the sum of a product with 5 to 11 rows between two threads, as of dW's last
    rows where the logits are recomputed.
    """
    found = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.add(digest("cpu", dtype, case, products=dtype != torch.float32))
    assert len(found) == 1


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_from_logits(dtype: torch.dtype, threads: None) -> None:
    found = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.add(logits_digest(dtype))
    assert len(found) == 1


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no C++ compiler")
def test_another_process() -> None:
    code = "import test_determinism as t, torch; print(t.digest('cpu', torch.bfloat16, 'compact'))"
    here = digest("cpu", torch.bfloat16, "compact")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=__file__.rpartition("/")[0])
    assert done.stdout.strip() == here, done.stderr
