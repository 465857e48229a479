"""Vocabulary compaction: what is dropped, the bound on what that costs, and the fallbacks."""

from __future__ import annotations

import pytest
import torch
from close import assert_close
from heads import peaked
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdpo import compaction, eager, linear_token_logps
from fastdpo.backend import load
from fastdpo.compaction import choose_columns, hidden_error_bound
from fastdpo.options import Transform

TOL = 2.0**-10


def gradients(hidden: Tensor, weight: Tensor, labels: Tensor, g: Tensor, **keywords) -> tuple[Tensor, ...]:
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_token_logps(h, w, labels, stats=("dropped_mass",), **keywords)
    out.logps.backward(g.to(out.logps.dtype))
    return out.logps.detach(), out.dropped_mass, h.grad, w.grad


def test_choose_columns() -> None:
    mass = torch.tensor([0.5, 1e-4, 0.2, 2e-4, 0.3, 5e-4])
    assert choose_columns(mass, torch.tensor([0]), 4e-4).tolist() == [0, 2, 4, 5]
    assert choose_columns(mass, torch.tensor([1]), 4e-4).tolist() == [0, 1, 2, 4, 5]  # a target stays
    assert choose_columns(mass, torch.tensor([0]), 0.0).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keywords", [{}, dict(softcap=60.0, temperature=0.8)], ids=["plain", "softcap"])
def test_close_to_exact(backend: str, dtype: torch.dtype, keywords: dict) -> None:
    """Two tiles and a bit, some labels ignored: within the tolerance of exact, and something was dropped."""
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bf16")
    hidden, weight, labels = (x.to(dtype) if x.is_floating_point() else x for x in peaked(600))
    labels[::7] = -100
    g = torch.randn(600)
    logps, dropped, dx, dw = gradients(hidden, weight, labels, g, grad_tol=TOL, backend=backend, **keywords)
    true = gradients(hidden.double(), weight.double(), labels, g.double(), **keywords)
    exact = gradients(hidden, weight, labels, g, grad_tol=0, backend="eager", **keywords)
    assert_close(logps, true[0], exact[0], unit=1)
    counted = labels != -100
    assert 0 < dropped[counted].mean() <= TOL * 1.001
    assert (dropped[~counted] == 0).all() and exact[1].count_nonzero() == 0
    for result, truth, plain in zip((dx, dw), true[2:], exact[2:], strict=True):
        error = (result.double() - truth).norm() / truth.norm()
        assert error < 5e-3 + (plain.double() - truth).norm() / truth.norm()
    assert dx[~counted].count_nonzero() == 0


@settings(max_examples=50, deadline=None, derandomize=True)
@example(tokens=1, sharp=4.0, tol=0.03125, softcap=None, seed=17)  # dropped mass of 2e-8, lost by a float32 sum
@given(
    tokens=st.integers(1, 40),
    sharp=st.floats(0.5, 4.0),
    tol=st.floats(1e-4, 0.05),
    softcap=st.sampled_from([None, 10.0]),
    seed=st.integers(0, 2**16),
)
def test_the_bound_holds(tokens: int, sharp: float, tol: float, softcap: float | None, seed: int) -> None:
    """In float64, where rounding does not hide anything: error of dX, token by token, against the stated bound."""
    hidden, weight, labels = (x.double() if x.is_floating_point() else x for x in peaked(tokens, 211, 8, sharp, seed))
    transform = Transform(0.9, softcap, 1.1)
    g = torch.randn(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    logits = hidden @ weight.T
    logps, lse = eager.row_forward(logits[None], labels, transform, ())
    compact = compaction.compact_tile(logits, labels, lse, weight, transform, tol, eager)
    if compact is None:
        assert len(choose_columns(eager.column_mass(logits, lse, transform), labels, tol * tokens)) > 211 / 4
        return
    assert compact.dropped.sum() <= tol * tokens * (1 + 1e-6)
    dw = torch.zeros_like(weight)
    (dx,) = compaction.backward(
        [(compaction.Rows(hidden, labels, logps, lse, g), compact)], weight, transform, eager, True, dw, None, True
    )
    grad = torch.empty_like(logits)
    eager.row_backward(logits[None], labels, logps, lse, None, g, None, transform, 0, grad[None])
    error = (dx - grad @ weight).norm(dim=1)
    bound = hidden_error_bound(g, compact.dropped, weight, compact.mean_row, transform)
    assert (error <= bound * (1 + 1e-5) + 1e-9).all()
    kept = compact.columns.long()
    torch.testing.assert_close(dw[kept], (grad.T @ hidden)[kept], rtol=1e-4, atol=1e-7)


def test_dense_softmax_is_exact(backend: str) -> None:
    """Random weights: no column can be dropped, the results are those of exact mode bit for bit."""
    hidden, weight, labels = torch.randn(300, 16) * 0.1, torch.randn(2000, 16) * 0.1, torch.randint(0, 2000, (300,))
    g = torch.randn(300)
    compact = gradients(hidden, weight, labels, g, grad_tol=TOL, backend=backend, workspace_mb=1)
    exact = gradients(hidden, weight, labels, g, grad_tol=0, backend=backend, workspace_mb=1)
    for a, b in zip(compact[1:], exact[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparse_and_dense_tiles_mix(dtype: torch.dtype) -> None:
    hidden, weight, labels = peaked(512)
    hidden[256:] *= 0.01  # the second tile's softmax is flat
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    g = torch.randn(512)
    _, dropped, dx, dw = gradients(hidden, weight, labels, g, grad_tol=TOL)
    assert dropped[:256].any() and not dropped[256:].any()
    _, _, true_dx, true_dw = gradients(hidden.double(), weight.double(), labels, g.double())
    assert (dx.double() - true_dx).norm() < 1e-2 * true_dx.norm()
    assert (dw.double() - true_dw).norm() < 1e-2 * true_dw.norm()


def test_only_what_needs_a_gradient(backend: str) -> None:
    hidden, weight, labels = peaked(300)
    bias = torch.randn(3001) * 0.1
    full = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]

    def run(h: Tensor, w: Tensor, b: Tensor) -> None:
        linear_token_logps(h, w, labels, bias=b, grad_tol=TOL, backend=backend).logps.sum().backward()

    run(*full)
    truth = [x.detach().double().requires_grad_() for x in full]
    run(*truth) if backend == "eager" else linear_token_logps(
        truth[0], truth[1], labels, bias=truth[2], grad_tol=0
    ).logps.sum().backward()
    for number, leaf in enumerate(full):
        assert (leaf.grad.double() - truth[number].grad).norm() < 5e-3 * truth[number].grad.norm()
        alone = [x.detach().clone() for x in full]
        alone[number].requires_grad_()
        run(*alone)
        torch.testing.assert_close(alone[number].grad, leaf.grad, rtol=1e-5, atol=1e-6)


def test_gradient_of_the_entropy_is_exact(backend: str) -> None:
    hidden, weight, labels = peaked(300)
    grads = []
    for tol in (TOL, 0):
        h = hidden.clone().requires_grad_()
        linear_token_logps(
            h, weight, labels, stats=("entropy",), grad_tol=tol, backend=backend
        ).entropy.sum().backward()
        grads.append(h.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_retained_graph_and_accumulation() -> None:
    """Two backwards through one graph, and the same weight as policy and reference in one graph."""
    hidden, weight, labels = peaked(300)
    w = weight.bfloat16().requires_grad_()
    h = hidden.bfloat16().requires_grad_()
    logps = linear_token_logps(h, w, labels).logps
    first = torch.autograd.grad(logps.sum(), [h, w], retain_graph=True)
    second = torch.autograd.grad(logps.sum(), [h, w], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    reference = linear_token_logps(h.detach(), w, labels).logps
    (both,) = torch.autograd.grad(logps.sum() + reference.sum(), w)
    torch.testing.assert_close(both, 2 * first[1])


STREAMS = not isinstance(load("cpu"), str) and load("cpu").streams()  # type: ignore[union-attr]


@pytest.mark.skipif(not STREAMS, reason="this CPU has no bf16 products")
@pytest.mark.parametrize("vocab", [70, 1024, 2085, 70001])
@pytest.mark.parametrize("tokens", [1, 5, 256])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("transform", [Transform(), Transform(-0.5, 20.0, 1.5)], ids=["plain", "softcap"])
def test_streamed_tile(vocab: int, tokens: int, weight_dtype: torch.dtype, transform: Transform) -> None:
    """One pass from hidden states: float32 logits, so float32's accuracy from bf16 inputs; and P."""
    cpu = load("cpu")
    assert not isinstance(cpu, str)
    hidden, weight, labels = peaked(tokens, vocab, 24)
    hidden, weight, bias = hidden.bfloat16(), weight.to(weight_dtype), torch.randn(vocab)
    labels[0] = vocab - 1
    stats = ("is_top1", "entropy", "mean_logits", "log_sum_sq_probs")
    logits = hidden.double() @ weight.bfloat16().double().T + bias.double()
    labels[-1] = (logits[-1] * transform.logit_scale).argmax()
    truth = eager.row_forward(logits[None], labels, transform, stats)
    plain = eager.row_forward(logits.float()[None], labels, transform, stats)
    results, (compact,) = cpu.stream_forward(hidden, weight, bias, labels, transform, stats, 256, TOL, 256.0)
    for name, result, true, yardstick in zip(("logps", "lse", *stats), results, truth, plain, strict=True):
        if name == "is_top1":
            assert torch.equal(result, true)
        else:
            assert_close(result, true, yardstick, unit=10)
    again, (nothing,) = cpu.stream_forward(hidden, weight, bias, labels, transform, (), 256, 0.0, 256.0)
    assert nothing is None
    assert_close(again[0], truth[0], plain[0], unit=10)
    if compact is not None:
        probs = torch.softmax(eager._transformed(logits, transform)[0], dim=1)[:, compact.columns].T
        torch.testing.assert_close(compact.probs.double(), probs, rtol=2**-8, atol=1e-6)
        assert set(labels.tolist()) <= set(compact.columns.tolist())
        assert (compact.columns.diff() > 0).all()
        torch.testing.assert_close(compact.dropped.double(), 1 - probs.sum(0), rtol=1e-3, atol=1e-5)
        assert compact.dropped.sum() <= TOL * tokens * 1.001


@pytest.mark.skipif(not STREAMS, reason="this CPU has no bf16 products")
def test_streamed_extremes() -> None:
    """Logits in the thousands, on either side of the target's; a column of -inf bias."""
    cpu = load("cpu")
    assert not isinstance(cpu, str)
    hidden, weight, labels = peaked(20, 5000, 16, sharp=300.0)
    bias = torch.zeros(5000)
    bias[11] = -torch.inf
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    logits = hidden.double() @ weight.double().T + bias.double()
    labels[:10] = logits[:10].nan_to_num(neginf=0).argmin(1)
    truth = eager.row_forward(logits[None], labels, Transform(), ("entropy",))
    (logps, lse, entropy), (compact,) = cpu.stream_forward(
        hidden, weight, bias, labels, Transform(), ("entropy",), 256, TOL, 256.0
    )
    torch.testing.assert_close(logps.double(), truth[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(lse.double(), truth[1], rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(entropy.double(), truth[2], rtol=1e-3, atol=1e-3)
    assert compact is not None and set(labels.tolist()) <= set(compact.columns.tolist())


@pytest.mark.skipif(not STREAMS, reason="this CPU has no bf16 products")
@pytest.mark.parametrize("tokens", [1, 37, 600])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("transform", [Transform(), Transform(-0.5, 20.0, 1.5)], ids=["plain", "softcap"])
@pytest.mark.parametrize("with_entropy", [False, True], ids=["logps", "logps+entropy"])
def test_streamed_gradient(tokens: int, weight_dtype: torch.dtype, transform: Transform, with_entropy: bool) -> None:
    """Columns 100.. 999 of 1100: bf16 rounds the gradient, nothing else."""
    cpu = load("cpu")
    assert not isinstance(cpu, str)
    hidden, weight, labels = peaked(tokens, 1100, 24)
    hidden, weight, bias = hidden.bfloat16(), weight.to(weight_dtype), torch.randn(1100)
    logits = hidden.double() @ weight.bfloat16().double().T + bias.double()
    logps, lse, entropy = eager.row_forward(logits[None], labels, transform, ("entropy",))
    g, h = torch.randn(tokens), torch.randn(tokens) if with_entropy else None
    truth = torch.empty_like(logits)
    given = [labels, logps, lse, entropy, g.double(), None if h is None else h.double()]
    eager.row_backward(logits[None], *given, transform, 0, truth[None])
    given = [None if x is None else x.float() if x.is_floating_point() else x for x in given[:4]] + [g, h]
    result = torch.empty(900, tokens, dtype=torch.bfloat16)
    cpu.stream_gradient(hidden, weight, bias, *given, transform, 100, result)
    torch.testing.assert_close(result.double(), truth[:, 100:1000].T, rtol=2**-7, atol=1e-5)


@pytest.mark.skipif(not STREAMS, reason="this CPU has no bf16 products")
@pytest.mark.parametrize("add", [False, True], ids=["alone", "beside dense tiles"])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("transform", [Transform(), Transform(0.9, 20.0, 0.7)], ids=["plain", "softcap"])
def test_streamed_backward(add: bool, weight_dtype: torch.dtype, transform: Transform) -> None:
    """Tiles of 96, 96 and 41 tokens that share columns, against compaction.backward on the same columns in float64."""
    cpu = load("cpu")
    assert not isinstance(cpu, str)
    hidden, weight, labels = peaked(233, 3001, 700, sharp=0.2)
    hidden, weight = hidden.bfloat16(), weight.to(weight_dtype)
    (logps, lse), kept = cpu.stream_forward(hidden, weight, None, labels, transform, (), 96, 2**-6, 256.0)
    assert None not in kept
    g = torch.randn(233)
    dx, dw, db = torch.empty(233, 700), torch.full_like(weight, 0.5), torch.full((3001,), 0.5)
    tiles = [(96 * i, compact) for i, compact in enumerate(kept)]
    cpu.stream_backward(hidden, weight, labels, logps, lse, g, transform, tiles, dx, dw, db, add)
    inputs = [
        (
            compaction.Rows(*(x[a : a + 96].double() if x.is_floating_point() else x[a : a + 96] for x in rows)),
            compaction.Compact(*(x.double() if x.is_floating_point() else x for x in compact)),
        )
        for rows in [(hidden, labels, logps, lse, g)]
        for a, compact in tiles
    ]
    true_dw, true_db = (torch.full_like(x, 0.5 * add, dtype=torch.float64) for x in (dw, db))
    true_dx = compaction.backward(inputs, weight.double(), transform, eager, True, true_dw, true_db, zeros=not add)
    rounding = 2**-8  # of D, and of dW where it is bf16
    for result, truth in ((dx, torch.cat(true_dx)), (dw, true_dw), (db, true_db)):
        assert (result.double() - truth).norm() < rounding * truth.norm()
    untouched = torch.ones(3001, dtype=torch.bool)
    for compact in kept:
        untouched[compact.columns.long()] = False
    assert untouched.any() and (dw[untouched] == 0.5 * add).all() and (db[untouched] == 0.5 * add).all()


@pytest.mark.skipif(not STREAMS, reason="this CPU has no bf16 products")
def test_streamed_bits_do_not_depend_on_threads() -> None:
    hidden, weight, labels = peaked(600, 9001, 32)
    hidden, weight, g = hidden.bfloat16(), weight.bfloat16(), torch.randn(600)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gradients(hidden, weight, labels, g))
    finally:
        torch.set_num_threads(threads)
    assert results[0][1].any()
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_head(backend: str, dtype: torch.dtype) -> None:
    """Only hidden needs a gradient: the forward computes it but for its factor, and keeps no columns."""
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bf16")
    hidden, weight, labels = (x.to(dtype) if x.is_floating_point() else x for x in peaked(600))
    labels[::7] = -100
    h, g = hidden.clone().requires_grad_(), torch.randn(600)
    keywords = dict(stats=("dropped_mass",), grad_tol=TOL, softcap=60.0, temperature=0.8, backend=backend)
    out = linear_token_logps(h, weight, labels, **keywords)
    w = weight.clone().requires_grad_()
    whole = linear_token_logps(h, w, labels, **keywords)
    frozen, truth = (torch.autograd.grad(x.logps, h, g, retain_graph=True)[0] for x in (out, whole))
    assert torch.equal(out.dropped_mass, whole.dropped_mass) and out.dropped_mass.any()
    assert (frozen - truth).norm() < 5e-3 * truth.norm()
    assert torch.equal(frozen, torch.autograd.grad(out.logps, h, g, retain_graph=True)[0])
    kept = sum(x.numel() for x in out.logps.grad_fn.saved_tensors if x is not None)
    assert kept <= hidden.numel() * 2 + weight.numel() + 600 * 5
