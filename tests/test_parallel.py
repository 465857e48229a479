"""The vocabulary split over two processes: results and gradients as one process has them."""

from __future__ import annotations

from typing import Any

import parallel_workers as workers
import pytest
import ranks
import torch
from close import assert_close
from parallel_workers import Case
from torch import Tensor

from fastdpo.backend import load

STATS = ("entropy", "mean_logits", "log_sum_sq_probs", "lse")
EXACT = {"grad_tol": 0.0}
COMPACT = {"grad_tol": 2.0**-10}
TRANSFORM = {"softcap": 60.0, "logit_scale": 0.9, "temperature": 0.8}

HIDDEN = [
    Case("kept logits", keywords=EXACT | {"stats": STATS}),
    Case("recomputed, small tiles", keywords=EXACT | {"workspace_mb": 0.5, "stats": STATS}),
    Case("C++", backend="cpu", keywords=EXACT | {"stats": STATS}, bias=True),
    Case("transform", backend="cpu", bias=True, keywords=EXACT | TRANSFORM),
    Case("Triton", backend="triton", tokens=20, sizes=(130, 171), keywords=EXACT | {"stats": ("entropy",)}),
    Case("three columns against all others", sizes=(3, 2998), keywords=EXACT),
    Case("frozen head", frozen=True, keywords=EXACT),
    Case("float64", dtype=torch.float64, keywords=EXACT),
]
STREAMED = [
    Case("streamed", backend="cpu", dtype=torch.bfloat16, bias=True, keywords=EXACT | {"stats": STATS}),
    Case("no target of rank 0", backend="cpu", dtype=torch.bfloat16, sizes=(1200, 1801), others=True, keywords=EXACT),
    Case("screened", backend="cpu", dtype=torch.bfloat16, sizes=(17000, 20000)),
    Case("nothing to keep", backend="cpu", dtype=torch.bfloat16, sizes=(17000, 20000), others=True),
    Case("forward only", backend="cpu", dtype=torch.bfloat16, sizes=(17000, 20000), forward=True),
]
EMPTY = [
    Case("exact", nothing=True, keywords=EXACT | {"stats": STATS}),
    Case("compact", nothing=True, keywords=COMPACT),
    Case("streamed", nothing=True, backend="cpu", dtype=torch.bfloat16),
]
LOGITS = [
    Case("nothing counts", nothing=True, keywords={"stats": STATS}),
    Case("eager", keywords={"stats": STATS}),
    Case("C++", backend="cpu", keywords={"stats": STATS, **TRANSFORM}),
    Case("Triton", backend="triton", tokens=20, sizes=(130, 171), keywords={"stats": STATS}),
]
SPARSE = [
    Case("eager", keywords=COMPACT | {"stats": ("dropped_mass",)}),
    Case("C++", backend="cpu", bias=True, keywords=COMPACT | TRANSFORM | {"stats": ("dropped_mass",)}),
    Case("Triton", backend="triton", tokens=40, keywords=COMPACT | {"stats": ("dropped_mass",)}),
    Case("streamed", backend="cpu", dtype=torch.bfloat16, keywords={"stats": ("dropped_mass",)}),
    Case("streamed, frozen", backend="cpu", dtype=torch.bfloat16, frozen=True, keywords={"stats": ("dropped_mass",)}),
    Case(
        "streamed, transform",
        backend="cpu",
        dtype=torch.bfloat16,
        bias=True,
        keywords=TRANSFORM | {"stats": ("dropped_mass", "entropy")},
    ),
]
LINEAR = [c._replace(name=f"exact, {c.name}") for c in HIDDEN] + SPARSE
LINEAR += [c._replace(name=f"share, {c.name}") for c in STREAMED]
LINEAR += [c._replace(name=f"nothing counts, {c.name}") for c in EMPTY]
CALLS = [(workers.linear, c) for c in LINEAR] + [(workers.from_logits, c) for c in LOGITS]


@pytest.fixture(scope="module")
def found() -> dict[Any, list[dict[str, Tensor]]]:
    """What each rank got, by call."""
    calls = [(call, case) for call, case in CALLS if not isinstance(load(case.backend), str)]
    by_rank = ranks.run(workers.vocab_parallel, calls)
    return {(call, case.name): list(both) for (call, case), both in zip(calls, zip(*by_rank, strict=True), strict=True)}


def whole(name: str, parts: list[Tensor]) -> Tensor:
    """Of the ranks' parts; what both have must be the same."""
    if name in ("d weight", "d bias"):
        return torch.cat(parts)
    if name == "d logits":
        return torch.cat(parts, dim=1)
    assert torch.equal(*parts), f"{name}: the same on both ranks"
    return parts[0]


@pytest.mark.parametrize(("call", "case"), [pytest.param(*c, id=f"{c[0].__name__}, {c[1].name}") for c in CALLS])
def test_as_one_process(call: Any, case: Case, found: dict[Any, Any]) -> None:
    if (call, case.name) not in found:
        pytest.skip(f"{case.backend}: cannot run here")
    both = found[call, case.name]
    exact = {} if call is workers.from_logits else EXACT
    truth = call(case._replace(dtype=torch.float64, backend="eager", keywords=case.keywords | exact))
    alone = call(case)
    assert set(both[0]) == set(alone)
    for name in alone:
        if name in ("kept", "dropped_mass"):
            continue
        result = whole(name, [part[name] for part in both])
        if case.keywords.get("grad_tol") == 0 or call is workers.from_logits or not name.startswith("d "):
            assert_close(result, truth[name], alone[name], unit=truth[name].abs().max().item())
        else:  # columns are left out: at most as much as one process leaves out
            assert relative(result, truth[name]) < 1.5 * relative(alone[name], truth[name]) + 1e-5


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in SPARSE])
def test_stays_compact(case: Case, found: dict[Any, Any]) -> None:
    """Each rank keeps its part of the columns, within the tolerance of all."""
    if (workers.linear, case.name) not in found:
        pytest.skip(f"{case.backend}: cannot run here")
    both, alone = found[workers.linear, case.name], workers.linear(case)
    counted = case.inputs()["labels"] != -100
    assert 0 < both[0]["dropped_mass"][counted].mean() <= 2.0**-10
    fixed = case.tokens * 32 * 4 if case.frozen else 0  # hidden_grad [n, H] does not depend on V
    for part in both:
        small = case.tokens * 50  # a few numbers a token: logps, lse, dropped; hidden in another dtype
        assert part["kept"] - fixed - small < 0.8 * (alone["kept"] - fixed - small), "what a rank keeps falls"


def relative(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()
