"""Any shape, layout, dtype, labels and logits, on every backend: values and gradients of plain float64 PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from compaction_kit import kept
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdpo import linear_token_logps, tiles, token_logps
from fastdpo.backend import load

LAYOUTS = {"dense": (0, 0), "rows apart": (0, 9), "odd start": (3, 4), "aligned": (8, 8)}  # columns before, after
STATS = ("entropy", "mean_logits", "log_sum_sq_probs", "lse")
TRANSFORMS = (
    {},
    {"softcap": 5.0},
    {"logit_scale": 0.3, "temperature": 0.5},
    {"logit_scale": -0.5, "softcap": 20.0, "temperature": 0.8},
)
# relative to the largest magnitude involved; bf16 and fp16 gradients are rounded to 8 and 11 bits
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
LABELS = st.sampled_from(["any", "none", "first", "last", "some"])
DTYPES = st.sampled_from(list(ROUNDING))
# The same few examples in every run; and, with -m slow, others each time, printed so that they can be had again
FEW = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MANY = settings(FEW, max_examples=250, derandomize=False, print_blob=True)


class Case(NamedTuple):
    rows: int
    vocab: int
    dtype: torch.dtype
    kind: str  # of logits
    labels: str
    layout: str
    transform: dict[str, float]
    inplace: bool
    seed: int


CASES = st.builds(
    Case,
    rows=st.integers(0, 9),
    vocab=st.sampled_from([1, 2, 7, 8, 31, 64, 127, 257, 1000, 2051]),
    dtype=DTYPES,
    kind=st.sampled_from(["normal", "huge", "tiny", "equal", "masked", "one finite", "peaked"]),
    labels=LABELS,
    layout=st.sampled_from(list(LAYOUTS)),
    transform=st.sampled_from(TRANSFORMS),
    inplace=st.booleans(),
    seed=st.integers(0, 2**16),
)


class HeadCase(NamedTuple):
    rows: int  # tiles are of 16 to 32
    width: int
    vocab: int  # of the largest the streamed head has two waves
    dtype: torch.dtype
    kind: str  # of logits
    labels: str
    layout: str  # of hidden and weight
    bias: bool
    entropy: bool  # is differentiated too
    tol: float | str
    workspace: float
    frozen: bool
    transform: dict[str, float]
    seed: int


HEAD_CASES = st.builds(
    HeadCase,
    rows=st.integers(0, 40),
    width=st.sampled_from([1, 2, 6, 16, 33, 34]),
    vocab=st.sampled_from([1, 5, 64, 101, 515, 49157]),
    dtype=DTYPES,
    kind=st.sampled_from(["normal", "normal", "huge", "equal"]),
    labels=LABELS,
    layout=st.sampled_from(list(LAYOUTS)),
    bias=st.booleans(),
    entropy=st.sampled_from([False, False, True]),
    tol=st.sampled_from(["auto", 0, 2**-6]),
    workspace=st.sampled_from([0.001, 0.02, 256]),
    frozen=st.booleans(),
    transform=st.sampled_from(TRANSFORMS),
    seed=st.integers(0, 2**16),
)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows are several tiles; of a frozen head, several groups of them."""
    monkeypatch.setattr(tiles, "_COMPACT_TOKENS", 16)
    monkeypatch.setattr(tiles, "_FROZEN_TILES", 1)


def labels_of(kind: str, rows: int, vocab: int, generator: torch.Generator) -> Tensor:
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    return {"first": torch.zeros_like(labels), "last": torch.full_like(labels, vocab - 1)}.get(kind, labels)


def ignoring(kind: str, labels: Tensor, generator: torch.Generator) -> Tensor:
    share = {"none": 1.0, "some": 0.5}.get(kind, 0.0)
    return labels.masked_fill(torch.rand(labels.shape, generator=generator) < share, -100)


def within(matrix: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    """Its rows as rows of a larger tensor, which is NaN around them."""
    before, between = LAYOUTS[layout]
    around = torch.full((len(matrix) + 2, before + matrix.shape[1] + between), math.nan, dtype=dtype)
    return around[1:-1, before : before + matrix.shape[1]].copy_(matrix)


def make(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits `[rows, V]` in the layout asked for, labels `[rows]`; a masked column is never a label."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.rows, case.vocab)
    logits = torch.randn(shape, generator=generator) * {"huge": 1e4, "tiny": 1e-4}.get(case.kind, 3.0)
    labels = labels_of(case.labels, *shape, generator)
    if case.kind == "equal":
        logits = torch.full(shape, 7.0)
    if case.kind in ("masked", "one finite"):
        share = 0.5 if case.kind == "masked" else 2.0
        hidden = torch.rand(shape, generator=generator) < share
        logits[hidden.scatter(1, labels[:, None], False)] = -math.inf
    if case.kind == "peaked":
        logits.scatter_(1, labels[:, None], 200.0)
    logits = logits.clamp(-6e4, 6e4) if case.kind == "huge" else logits
    return within(logits, case.layout, dtype), ignoring(case.labels, labels, generator)


def make_head(case: HeadCase, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """hidden `[rows, H]` and weight `[V, H]` in the layout asked for, bias `[V]`, labels `[rows]`."""
    generator = torch.Generator().manual_seed(case.seed)
    shapes = ((case.rows, case.width), (case.vocab, case.width), (case.vocab,))
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    if case.kind == "huge":  # up to 8,704, in steps of 256: exact in every dtype
        hidden, weight, bias = (x.round().clamp(-1, 1) for x in (hidden, weight, bias))
        hidden, weight, bias = hidden * 128, weight * 2, bias * 256
    else:
        weight = weight * 2 if case.kind == "normal" else torch.zeros_like(weight)
        bias = bias if case.kind == "normal" else torch.full_like(bias, 3.0)
    labels = ignoring(case.labels, labels_of(case.labels, case.rows, case.vocab, generator), generator)
    return within(hidden, case.layout, dtype), within(weight, case.layout, dtype), bias.to(dtype), labels


def truth_of(
    raw: Tensor, labels: Tensor, softcap: float | None = None, logit_scale: float = 1.0, temperature: float = 1.0
) -> dict[str, Tensor]:
    """logps and statistics of float64 logits, in plain PyTorch."""
    z = raw * logit_scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    counted = labels >= 0
    lse = z.logsumexp(1)
    logp = z - lse[:, None]
    p = logp.exp()
    found = {
        "logps": logp.gather(1, labels.clamp(min=0)[:, None]).squeeze(1),
        "entropy": -(p * logp.masked_fill(p == 0, 0)).sum(1),
        "mean_logits": z.mean(1),
        "log_sum_sq_probs": (2 * logp).logsumexp(1),
        "lse": lse,
    }
    return {name: torch.where(counted, value, 0.0) for name, value in found.items()}


def slope(softcap: float | None = None, logit_scale: float = 1.0, temperature: float = 1.0) -> float:
    """The largest |dz / d raw|."""
    return abs(logit_scale) / temperature


def largest(x: Tensor) -> float:
    return max(1.0, x.abs().max().item() if x.numel() else 0.0)


def dtype_for(backend: str, dtype: torch.dtype) -> torch.dtype:
    """Triton's interpreter has no bf16."""
    return torch.float16 if backend == "triton" and dtype == torch.bfloat16 else dtype


def from_logits(backend: str, case: Case) -> None:
    logits, labels = make(case, dtype_for(backend, case.dtype))
    grads = torch.randn(2, case.rows, generator=torch.Generator().manual_seed(1))
    x = logits.double().requires_grad_()
    truth = truth_of(x, labels, **case.transform)
    (gradient,) = torch.autograd.grad([truth["logps"], truth["entropy"]], x, list(grads.double()))
    leaf = logits.detach().requires_grad_()
    out = token_logps(leaf, labels, stats=STATS, backend=backend, inplace_backward=case.inplace, **case.transform)
    size = largest(truth["lse"])
    for name, value in truth.items():
        result, value = getattr(out, name).detach().double(), value.detach()
        if name == "mean_logits" and not value.isfinite().all():
            assert torch.equal(result.isfinite(), value.isfinite())
            continue
        torch.testing.assert_close(result, value, rtol=1e-5, atol=3e-6 * size)
    (result,) = torch.autograd.grad([out.logps, out.entropy], leaf, list(grads))
    assert result.isfinite().all()
    assert not case.rows or (result.data_ptr() == leaf.data_ptr()) == case.inplace
    # p's relative error where logits are large; the entropy's gradient has log p for a factor
    off = ROUNDING[logits.dtype] + 1e-6 * size
    scale = slope(**case.transform) * (largest(grads[0]) + largest(grads[1]) * (1 + math.log(case.vocab)))
    torch.testing.assert_close(result.double(), gradient, rtol=0, atol=scale * off)
    assert result[labels < 0].count_nonzero() == 0


def from_hidden(backend: str, case: HeadCase) -> list[str | None]:
    """What its tiles kept."""
    if backend == "triton":  # the interpreter is slow
        case = case._replace(vocab=min(case.vocab, 1003))
    dtype = dtype_for(backend, case.dtype)
    *tensors, labels = make_head(case, dtype)
    tensors = tensors if case.bias else tensors[:2]
    grads = torch.randn(2, case.rows, generator=torch.Generator().manual_seed(1))
    grads = grads[: 1 + case.entropy]
    results: list[list[Tensor]] = []
    for exact in (True, False):
        leaves = [x.double() if exact else x.detach() for x in tensors]
        for leaf in leaves[: 1 if case.frozen else None]:
            leaf.requires_grad_()
        hidden, weight, bias = (*leaves, None)[:3]
        if exact:
            raw = hidden @ weight.T + (0 if bias is None else bias)
            found = truth_of(raw, labels, **case.transform)
            values = [found["logps"], found["entropy"]]
        else:
            out = linear_token_logps(
                *(hidden, weight, labels),
                bias=bias,
                stats=("entropy", "dropped_mass"),
                grad_tol=case.tol,
                workspace_mb=case.workspace,
                backend=backend,
                **case.transform,
            )
            values = [out.logps, out.entropy]
            found_kept = kept(out)  # before the backward uses it up
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        given = [g.to(value.dtype) for g, value in zip(grads, values, strict=False)]
        gradients = torch.autograd.grad(values[: len(given)], wanted, given)
        results.append([*(value.detach() for value in values), *gradients])
    # What was left out of a token's gradient, at most: its mass, times rows of weight that lie so far apart; and of dW
    mass = slope(**case.transform) * grads[0].abs().double() * out.dropped_mass.double()
    if case.entropy:  # its gradient is exact, whatever was kept
        mass = torch.zeros_like(mass)
    none = torch.zeros(())
    lost = [none, none, 2 * largest(tensors[1]) * mass[:, None], largest(tensors[0]) * mass.sum(), mass.sum()]
    # As exact as the library's product, which sums V products in float32; and p is, where logits are large
    relative = 2e-5 + case.vocab * 2**-27 if dtype == torch.float32 else 3e-2
    relative += 1e-6 * largest(found["lse"])
    # Logits rounded to 8 or 11 bits (all but the streamed head's) move p by up to half of that; p log p by more
    moved = ROUNDING[dtype] * slope(**case.transform) * largest(raw) if dtype != torch.float32 else 0.0
    for number, (truth, result, less) in enumerate(zip(*results, lost, strict=False)):
        moves = 1.0 if number == 1 or (number > 1 and case.entropy) else 0.5
        off = (result.double() - truth).abs() - less
        assert (off <= largest(truth) * (relative + moved * moves)).all(), off.max()
    assert results[1][2][labels < 0].count_nonzero() == 0
    return found_kept


@given(case=CASES)
@FEW
def test_from_logits(backend: str, case: Case) -> None:
    from_logits(backend, case)


@pytest.mark.slow
@given(case=CASES)
@MANY
def test_from_logits_at_random(backend: str, case: Case) -> None:
    from_logits(backend, case)


@given(case=HEAD_CASES)
@FEW
def test_from_hidden(backend: str, small_tiles: None, case: HeadCase) -> None:
    from_hidden(backend, case)


@pytest.mark.slow
@given(case=HEAD_CASES)
@MANY
def test_from_hidden_at_random(backend: str, small_tiles: None, case: HeadCase) -> None:
    from_hidden(backend, case)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("tol", [0, 2**-6], ids=["exact", "compact"])
def test_the_sizes_reach_two_tiles_and_two_waves(backend: str, small_tiles: None, tol: float, frozen: bool) -> None:
    """Of what test_from_hidden draws, the largest case goes every way that depends on size."""
    case = HeadCase(
        *(40, 34, 49157, torch.bfloat16, "normal", "any", "odd start", True, False),
        *(tol, 256, frozen, {}, 0),
    )
    found = from_hidden(backend, case)
    streams = backend == "cpu" and load("cpu").streams()
    if tol:
        assert found == ["Frozen" if frozen else "Sparse" if streams else "Compact"] * (3 if frozen else 2)
    else:
        assert found == (["Exponentials"] if streams else [None])
        assert not streams or len(list(load("cpu").waves(case.vocab))) == 2


@pytest.mark.parametrize("label", [4, 2])
def test_an_infinite_logit_is_not_swallowed(backend: str, label: int) -> None:
    """Its row has no finite logp or gradient, whichever of NaN and infinity; the other rows are as they were."""
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
