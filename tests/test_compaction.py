"""Vocabulary compaction: what is dropped, the bound on what that costs, and the fallbacks."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from close import assert_close
from compaction_kit import TOL, gradients, tokens  # noqa: F401
from heads import peaked
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo import compaction, eager, linear_token_logps, tiles
from fastdpo.backend import load
from fastdpo.compaction import choose_columns, hidden_error_bound
from fastdpo.options import Transform
from fastdpo.saved import unflatten


def test_choose_columns() -> None:
    mass = torch.tensor([0.5, 1e-4, 0.2, 2e-4, 0.3, 5e-4])
    for targets, budget, kept in (
        ([0], 4e-4, [0, 2, 4, 5]),
        ([1], 4e-4, [0, 1, 2, 4, 5]),
        ([0], 0.0, [0, 1, 2, 3, 4, 5]),
    ):
        assert choose_columns(mass, torch.tensor(targets), budget).nonzero().flatten().tolist() == kept  # targets stay
    mass[2] = torch.nan
    assert choose_columns(mass, torch.tensor([0]), 4e-4).nonzero().flatten().tolist() == [0, 2, 4, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keywords", [{}, dict(softcap=60.0, temperature=0.8)], ids=["plain", "softcap"])
def test_close_to_exact(backend: str, tokens: int, dtype: torch.dtype, keywords: dict) -> None:
    """Some labels ignored: within the tolerance of exact, and something was dropped."""
    if backend == "triton" and dtype == torch.bfloat16:
        dtype = torch.float16  # the interpreter truncates to bf16
    hidden, weight, labels = (x.to(dtype) if x.is_floating_point() else x for x in peaked(tokens))
    labels[::7] = -100
    g = torch.randn(tokens)
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


class Compacted(NamedTuple):
    """One tile in float64, where rounding does not hide anything."""

    compact: compaction.Compact | None
    grad: Tensor  # d loss / d logits, exact
    dw: Tensor  # compacted
    error: Tensor  # [n], of dX
    bound: Tensor  # [n]

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, labels: Tensor, transform: Transform, tol: float, g: Tensor
    ) -> Compacted:
        logits = hidden @ weight.T
        logps, lse = eager.row_forward(logits[None], labels, transform, ())
        search = compaction.Search(weight, transform, tol, eager)
        search.add(logits, labels, lse)
        (compact,) = search.finish()
        grad, dw = torch.empty_like(logits), torch.zeros_like(weight)
        eager.row_backward(logits[None], labels, logps, lse, None, g, None, transform, 0, grad[None])
        if compact is None:
            assert (
                choose_columns(eager.column_mass(logits, lse, transform), labels, tol * len(g)).sum() > len(weight) / 4
            )
            return cls(None, grad, dw, g * 0, g * 0)
        rows = compaction.Rows(hidden, labels, logps, lse, g)
        (dx,) = compaction.backward([(rows, compact)], weight, transform, eager, True, dw, None, True)
        bound = hidden_error_bound(g, compact.dropped, weight, compact.mean_row, transform)
        return cls(compact, grad, dw, (dx - grad @ weight).norm(dim=1), bound)


@settings(max_examples=50, deadline=None, derandomize=True)
@example(tokens=1, sharp=4.0, tol=0.03125, softcap=None, scale=0.9, seed=17)  # mass of 2e-8, lost by a float32 sum
@given(
    tokens=st.integers(1, 40),
    sharp=st.floats(0.5, 4.0),
    tol=st.floats(1e-4, 0.05),
    softcap=st.sampled_from([None, 10.0]),
    scale=st.sampled_from([0.9, -3.0]),
    seed=st.integers(0, 2**16),
)
def test_the_bound_holds(tokens: int, sharp: float, tol: float, softcap: float | None, scale: float, seed: int) -> None:
    """Error of dX, token by token, against the stated bound."""
    hidden, weight, labels = (x.double() if x.is_floating_point() else x for x in peaked(tokens, 211, 8, sharp, seed))
    g = torch.randn(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = Compacted.of(hidden, weight, labels, Transform(scale, softcap, 1.1), tol, g)
    if found.compact is None:
        return
    assert found.compact.dropped.sum() <= tol * tokens * (1 + 1e-6)
    assert (found.error <= found.bound * (1 + 1e-5) + 1e-9).all()
    kept = found.compact.columns.long()
    torch.testing.assert_close(found.dw[kept], (found.grad.T @ hidden)[kept], rtol=1e-4, atol=1e-7)


def test_the_bound_under_a_softcap_counts_the_mean_row() -> None:
    """Where a softcap is flat at the dropped columns, all of their mean row's term is error, however near they are."""
    weight = torch.tensor([[-0.05, 0.0, 0.0, 1.0]], dtype=torch.float64).repeat(211, 1)
    weight[3, 0] = 0.05
    hidden = torch.tensor([[1000.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    g = torch.ones(1, dtype=torch.float64)
    found = Compacted.of(hidden, weight, torch.tensor([3]), Transform(1.0, 5.0, 1.0), 0.05, g)
    assert found.compact is not None and found.compact.columns.tolist() == [3]
    torch.testing.assert_close(found.error, found.compact.dropped * found.compact.mean_row.norm(), rtol=1e-6, atol=0)
    assert found.error <= found.bound * (1 + 1e-6)


def test_dense_softmax_is_exact(backend: str, tokens: int) -> None:
    """Random weights: no column can be dropped, the results are those of exact mode bit for bit."""
    hidden, weight = torch.randn(tokens, 16) * 0.1, torch.randn(2000, 16) * 0.1
    labels, g = torch.randint(0, 2000, (tokens,)), torch.randn(tokens)
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


@pytest.mark.parametrize("tokens", [16, 48, 100])
def test_one_tile_ahead(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile is gathered after the next one was computed, into another buffer: the same results, bit for bit."""
    monkeypatch.setattr(tiles, "_COMPACT_TOKENS", 16)
    hidden, weight, labels = peaked(tokens)
    g = torch.randn(tokens)
    results = [gradients(hidden, weight, labels, g, grad_tol=TOL, backend="eager")]
    monkeypatch.setattr(eager, "QUEUES", True, raising=False)
    results += [
        gradients(hidden, weight, labels, g, grad_tol=TOL, backend="eager", workspace_mb=mb) for mb in (256, 0.4)
    ]
    assert results[0][1].any()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class HostSyncs(TorchDispatchMode):
    """Counts the operations that would make the host wait for a GPU."""

    WAIT = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.nonzero,
        torch.ops.aten._unique2,
        torch.ops.aten.unique_dim,
        torch.ops.aten.unique_consecutive,
        torch.ops.aten.masked_select,
        torch.ops.aten.equal,
        torch.ops.aten.repeat_interleave,
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        tolist = Tensor.tolist  # of a CPU tensor it is no operation

        def counted(tensor: Tensor) -> list:
            self.count += 1
            return tolist(tensor)

        monkeypatch.setattr(Tensor, "tolist", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += func.overloadpacket in self.WAIT or by_mask
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False)], ids=["all", "frozen head"])
def test_host_waits_once_a_tile(needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: once for the rows that count, once a tile; in the backward twice where the tiles share dW, or never."""
    gpu = load("triton")
    if isinstance(gpu, str):
        pytest.skip(gpu)
    monkeypatch.setattr(tiles, "_COMPACT_TOKENS", 8)
    hidden, weight, labels = peaked(40, 300, 256, 0.1)
    labels[3] = -1
    # Room for two tiles, and for 40 columns of dW
    head = tiles.Head(weight, torch.zeros(300), Transform(), torch.float32, 0.02, 0.04, gpu)
    with HostSyncs(monkeypatch) as syncs:
        (logps, lse), saved = tiles.forward(head, hidden, labels, (), needs)
    assert saved is not None and len(saved.tiles) == 3 and all(tile[2] is not None for tile in saved.tiles)
    assert syncs.count == 1 + 3
    columns = [tile[2].columns for tile in saved.tiles if isinstance(tile[2], compaction.Compact)]
    assert not needs[1] or len(torch.cat(columns).unique()) > 40  # more than one range
    grads = tiles.RowGrads(labels, logps, lse, None, torch.ones(40), None)
    with HostSyncs(monkeypatch) as syncs:
        tiles.backward(head, hidden, grads, saved, needs)
    assert syncs.count == (2 if needs[1] else 0)


def test_only_what_needs_a_gradient(backend: str, tokens: int) -> None:
    hidden, weight, labels = peaked(tokens)
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


def test_gradient_of_the_entropy_is_exact(backend: str, tokens: int) -> None:
    hidden, weight, labels = peaked(tokens)
    grads = []
    for tol in (TOL, 0):
        h = hidden.clone().requires_grad_()
        linear_token_logps(
            h, weight, labels, stats=("entropy",), grad_tol=tol, backend=backend
        ).entropy.sum().backward()
        grads.append(h.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_nothing_is_kept_without_gradients(backend: str, tokens: int) -> None:
    """A reference's forward: its weight requires a gradient, grad mode is off."""
    hidden, weight, labels = peaked(tokens)
    weight.requires_grad_()
    with torch.no_grad():
        out = linear_token_logps(hidden, weight, labels, grad_tol=TOL, stats=("dropped_mass",), backend=backend)
    assert not out.dropped_mass.any() and not out.logps.requires_grad


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


@pytest.mark.parametrize("kind", ["tied", "view", "transposed"])
def test_weights_as_models_hold_them(kind: str, backend: str) -> None:
    """Tied to the embedding, rows of a larger parameter, a transposed buffer: compact, over three micro-batches."""
    dtype = torch.float16 if backend == "triton" else torch.bfloat16  # the interpreter truncates to bf16
    hidden, weight, labels = peaked(90)
    ids = torch.randint(0, len(weight), (90,))
    stored = {"tied": weight, "view": torch.cat([weight, weight[:50]]), "transposed": weight.T}[kind]

    def run(parameter: Tensor, batches: int, **keywords: Any) -> None:
        for rows in torch.arange(90).chunk(batches):
            head = {"tied": parameter, "view": parameter[: len(weight)], "transposed": parameter.T}[kind]
            states = hidden[rows].to(parameter.dtype) + (parameter[ids[rows]] * 0.1 if kind == "tied" else 0)
            out = linear_token_logps(states, head, labels[rows], stats=("dropped_mass",), **keywords)
            assert out.dropped_mass.any() == (dtype == parameter.dtype)
            out.logps.sum().backward()

    leaf = stored.contiguous().to(dtype).requires_grad_()
    truth = leaf.detach().double().requires_grad_()
    run(leaf, 3, grad_tol=TOL, backend=backend)
    run(truth, 1)
    assert (leaf.grad.double() - truth.grad).norm() < 2e-2 * truth.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_head(backend: str, tokens: int, dtype: torch.dtype) -> None:
    """Only hidden needs a gradient: the forward computes it but for its factor, and keeps no columns."""
    if backend == "triton" and dtype == torch.bfloat16:
        dtype = torch.float16  # the interpreter truncates to bf16
    hidden, weight, labels = (x.to(dtype) if x.is_floating_point() else x for x in peaked(tokens))
    labels[::7] = -100
    h, g = hidden.clone().requires_grad_(), torch.randn(tokens)
    keywords = dict(stats=("dropped_mass",), grad_tol=TOL, softcap=60.0, temperature=0.8, backend=backend)
    out = linear_token_logps(h, weight, labels, **keywords)
    w = weight.clone().requires_grad_()
    whole = linear_token_logps(h, w, labels, **keywords)
    frozen, truth = (torch.autograd.grad(x.logps, h, g, retain_graph=True)[0] for x in (out, whole))
    assert torch.equal(out.dropped_mass, whole.dropped_mass) and out.dropped_mass.any()
    assert (frozen - truth).norm() < 5e-3 * truth.norm()
    assert torch.equal(frozen, torch.autograd.grad(out.logps, h, g, retain_graph=True)[0])
    kept = sum(x.numel() for x in out.logps.grad_fn.saved_tensors if x is not None)
    assert kept <= hidden.numel() * 2 + weight.numel() + tokens * 6


def test_dropped_mass_of_float64() -> None:
    """As accurate as its inputs: one less what the kept columns hold, and the gradient is what that leaves."""
    hidden, weight, labels = (x.double() if x.is_floating_point() else x for x in peaked(90))
    out = linear_token_logps(hidden, weight.requires_grad_(), labels, grad_tol=TOL, stats=("dropped_mass",))
    node = out.logps.grad_fn
    ((_, _, kept),) = unflatten(node.saved_layout, list(node.saved_tensors[7:])).tiles
    whole = torch.softmax(hidden @ weight.T, dim=1)[:, kept.columns.long()]
    assert out.dropped_mass.dtype == torch.float64 and out.dropped_mass.any()
    torch.testing.assert_close(out.dropped_mass, 1 - whole.sum(1), rtol=0, atol=1e-14)
