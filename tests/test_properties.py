"""Any shape, layout, dtype, labels and logits, on every backend: values and gradients of plain float64 PyTorch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdpo import linear_token_logps, token_logps
from fastdpo.backend import load

LAYOUTS = {"dense": (0, 0), "rows apart": (0, 9), "odd start": (3, 4), "aligned": (8, 8)}  # columns before, after
BACKENDS = ("eager", "cpu", "triton")
STATS = ("entropy", "mean_logits", "log_sum_sq_probs", "lse")
# relative to the largest magnitude involved; bf16 and fp16 gradients are rounded to 8 and 11 bits
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SETTINGS = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Case(NamedTuple):
    rows: int
    vocab: int
    dtype: torch.dtype
    kind: str  # of logits
    labels: str
    layout: str
    seed: int


CASES = st.builds(
    Case,
    rows=st.integers(0, 9),
    vocab=st.sampled_from([1, 2, 7, 8, 31, 64, 127, 257, 1000, 2051]),
    dtype=st.sampled_from(list(ROUNDING)),
    kind=st.sampled_from(["normal", "huge", "tiny", "equal", "masked", "one finite", "peaked"]),
    labels=st.sampled_from(["any", "none", "first", "last", "some"]),
    layout=st.sampled_from(list(LAYOUTS)),
    seed=st.integers(0, 2**16),
)


def make(case: Case, backend: str) -> tuple[Tensor, Tensor]:
    """Logits `[rows, V]` in the layout asked for, labels `[rows]`; a masked column is never a label."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.rows, case.vocab)
    logits = torch.randn(shape, generator=generator) * {"huge": 1e4, "tiny": 1e-4}.get(case.kind, 3.0)
    labels = torch.randint(0, case.vocab, (case.rows,), generator=generator)
    labels = {"first": torch.zeros_like(labels), "last": torch.full_like(labels, case.vocab - 1)}.get(
        case.labels, labels
    )
    if case.kind == "equal":
        logits = torch.full(shape, 7.0)
    if case.kind in ("masked", "one finite"):
        share = 0.5 if case.kind == "masked" else 2.0
        hidden = torch.rand(shape, generator=generator) < share
        logits[hidden.scatter(1, labels[:, None], False)] = -math.inf
    if case.kind == "peaked":
        logits.scatter_(1, labels[:, None], 200.0)
    if case.labels == "none":
        labels = torch.full_like(labels, -100)
    if case.labels == "some":
        labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.5, -100)
    dtype = torch.float16 if backend == "triton" and case.dtype == torch.bfloat16 else case.dtype
    # Rows of a larger tensor, which is NaN around them
    before, between = LAYOUTS[case.layout]
    around = torch.full((case.rows + 2, before + case.vocab + between), math.nan, dtype=dtype)
    view = around[1:-1, before : before + case.vocab]
    return view.copy_(logits.clamp(-6e4, 6e4) if case.kind == "huge" else logits), labels


def truth_of(logits: Tensor, labels: Tensor, grads: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """In float64: logps and statistics, and d(sum grads * logps) / d logits."""
    x = logits.detach().double().requires_grad_()
    counted = labels >= 0
    lse = x.logsumexp(1)
    logp = x - lse[:, None]
    p = logp.exp()
    logps = torch.where(counted, logp.gather(1, labels.clamp(min=0)[:, None]).squeeze(1), 0.0)
    (gradient,) = torch.autograd.grad((logps * grads.double()).sum(), x)
    found = {
        "logps": logps,
        "entropy": -(p * logp.masked_fill(p == 0, 0)).sum(1),
        "mean_logits": x.mean(1),
        "log_sum_sq_probs": (2 * logp).logsumexp(1),
        "lse": lse,
    }
    return {name: torch.where(counted, value, 0.0).detach() for name, value in found.items()}, gradient


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=CASES)
@SETTINGS
def test_from_logits(backend: str, case: Case) -> None:
    if isinstance(load(backend), str):
        pytest.skip(f"{backend} cannot run here")
    logits, labels = make(case, backend)
    grads = torch.randn(case.rows, generator=torch.Generator().manual_seed(1))
    truth, gradient = truth_of(logits, labels, grads)
    leaf = logits.detach().requires_grad_()
    out = token_logps(leaf, labels, stats=STATS, backend=backend)
    largest = max(1.0, truth["lse"].abs().max().item()) if case.rows else 1.0
    for name, value in truth.items():
        result = getattr(out, name).detach().double()
        if name == "mean_logits" and case.kind in ("masked", "one finite"):
            assert torch.equal(result.isfinite(), value.isfinite())
            continue
        torch.testing.assert_close(result, value, rtol=1e-5, atol=3e-6 * largest)
    (result,) = torch.autograd.grad(out.logps, leaf, grads)
    assert result.isfinite().all()
    size = grads.abs().max().item() if case.rows else 1.0
    off = 1e-6 * largest  # p's relative error where logits are large
    torch.testing.assert_close(result.double(), gradient, rtol=0, atol=size * (ROUNDING[logits.dtype] + off))
    assert result[labels < 0].count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    rows=st.integers(0, 40),
    width=st.sampled_from([1, 2, 6, 16, 33]),
    vocab=st.sampled_from([1, 5, 64, 101, 515]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    tol=st.sampled_from(["auto", 0, 2**-6]),
    workspace=st.sampled_from([0.001, 0.02, 256]),
    frozen=st.booleans(),
    options=st.sampled_from([{}, {"softcap": 5.0}, {"logit_scale": 0.3, "temperature": 0.5}]),
    seed=st.integers(0, 2**16),
)
@SETTINGS
def test_from_hidden(
    backend: str,
    rows: int,
    width: int,
    vocab: int,
    dtype: torch.dtype,
    tol: Any,
    workspace: float,
    frozen: bool,
    options: dict[str, float],
    seed: int,
) -> None:
    if isinstance(load(backend), str):
        pytest.skip(f"{backend} cannot run here")
    if backend == "triton" and dtype == torch.bfloat16:
        dtype = torch.float16
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * 2).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels = labels.masked_fill(torch.rand(rows, generator=generator) < 0.2, -100)
    grads = torch.randn(rows, generator=generator)
    results = []
    for exact in (True, False):
        leaves = [t.double() if exact else t.clone() for t in (hidden, weight)]
        leaves[0].requires_grad_()
        leaves[1].requires_grad_(not frozen)
        further = {"grad_tol": 0, "backend": "eager"} if exact else {"grad_tol": tol, "backend": backend}
        if not exact:
            further["workspace_mb"] = workspace
        out = linear_token_logps(*leaves, labels, stats=("dropped_mass",), **further, **options)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(out.logps, wanted, grads.to(out.logps.dtype))
        results.append([out.logps.detach(), *gradients])
    # What was left out of a token's gradient, at most: its mass, times rows of weight that lie so far apart; and of dW
    mass = grads.abs().double() * out.dropped_mass.double()
    farthest = [x.abs().max().item() if x.numel() else 0.0 for x in (weight, hidden)]
    lost = [torch.zeros(()), 2 * farthest[0] * mass[:, None], farthest[1] * mass.sum()]
    for truth, result, less in zip(*results, lost, strict=False):
        scale = max(1.0, truth.abs().max().item() if truth.numel() else 1.0)
        off = (result.double() - truth).abs() - less
        assert (off <= scale * (2e-5 if dtype == torch.float32 else 3e-2)).all(), off.max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [4, 2])
def test_an_infinite_logit_is_not_swallowed(backend: str, label: int) -> None:
    """Its row has no finite logp or gradient, whichever of NaN and infinity; the other rows are as they were."""
    if isinstance(load(backend), str):
        pytest.skip(f"{backend} cannot run here")
    logits, labels = torch.randn(3, 300), torch.tensor([label, label, 7])
    results = []
    for value in (logits[0, 4].item(), math.inf):
        logits[0, 4] = value
        leaf = logits.clone().requires_grad_()
        logps = token_logps(leaf, labels, backend=backend).logps
        results.append((logps.detach(), torch.autograd.grad(logps.sum(), leaf)[0]))
    (plain, plain_gradient), (logps, gradient) = results
    assert not logps[0].isfinite() and not gradient[0].isfinite().all()
    assert torch.equal(logps[1:], plain[1:]) and torch.equal(gradient[1:], plain_gradient[1:])
