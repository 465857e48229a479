"""The streamed head on CPUs with bf16 products: tiles, entries, gradients, extremes."""

from __future__ import annotations

import pytest
import torch
from close import assert_close
from compaction_kit import TOL, filled, gradients
from heads import peaked
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo import compaction, eager, linear_token_logps
from fastdpo.backend import load
from fastdpo.compaction import hidden_error_bound
from fastdpo.options import Transform

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
    results, (compact,), _ = cpu.stream_forward(hidden, weight, bias, labels, transform, stats, 256, TOL, True, 256.0)
    for name, result, true, yardstick in zip(("logps", "lse", *stats), results, truth, plain, strict=True):
        if name == "is_top1":
            assert torch.equal(result, true)
        else:
            # From 16,384 columns on, those that cannot matter are summed from 8-bit products
            screened = {"entropy": 3e-4, "mean_logits": 5e-3}.get(name, 3e-5) if vocab >= 16384 else 0
            assert_close(result, true, yardstick, unit=max(10, screened / 2e-6))
    again, (nothing,), _ = cpu.stream_forward(hidden, weight, bias, labels, transform, (), 256, 0.0, False, 256.0)
    assert nothing is None
    assert_close(again[0], truth[0], plain[0], unit=10)
    if compact is not None:
        probs = torch.softmax(eager.transformed(logits, transform)[0], dim=1)[:, compact.columns].T
        found = filled(compact).probs.double()
        assert len(compact.entries) == found.count_nonzero()
        torch.testing.assert_close(found, torch.where(probs > TOL * 2**-15, probs, 0), rtol=2**-8, atol=1e-7)
        assert set(labels.tolist()) <= set(compact.columns.tolist())
        assert (compact.columns.diff() > 0).all()
        kept = torch.where(found > 0, probs, 0).sum(0)
        torch.testing.assert_close(compact.dropped.double(), 1 - kept, rtol=1e-3, atol=1e-5)
        assert compact.dropped.sum() <= TOL * tokens * 1.001


@pytest.mark.skipif(not STREAMS, reason="this CPU has no bf16 products")
@settings(max_examples=30, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 60), sharp=st.floats(0.5, 3.0), tol=st.floats(1e-4, 0.05), seed=st.integers(0, 2**16))
def test_the_bound_holds_of_entries(tokens: int, sharp: float, tol: float, seed: int) -> None:
    """A streamed tile drops single entries too: its dX with unrounded P, against the bound by its dropped mass."""
    cpu = load("cpu")
    assert not isinstance(cpu, str)
    hidden, weight, labels = (
        x.bfloat16() if x.is_floating_point() else x for x in peaked(tokens, 5003, 8, sharp, seed)
    )
    _, (kept,), _ = cpu.stream_forward(hidden, weight, None, labels, Transform(), (), tokens, tol, True, 256.0)
    if kept is None:
        return
    assert kept.dropped.sum() <= tol * tokens * 1.001
    probs = torch.softmax(hidden.double() @ weight.double().T, dim=1)
    there = torch.zeros_like(probs)
    there[:, kept.columns] = (filled(kept).probs.T > 0).double()
    g = torch.randn(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rest = probs * (1 - there)  # what dX lacks, but for its mean direction
    error = (g[:, None] * (rest @ weight.double() - kept.dropped[:, None] * kept.mean_row.double())).norm(dim=1)
    bound = hidden_error_bound(g, kept.dropped, weight, kept.mean_row, Transform())
    assert (error <= bound * (1 + 1e-3) + 1e-6).all()


@pytest.mark.skipif(not STREAMS, reason="this CPU has no bf16 products")
@pytest.mark.parametrize("common", [0.0, 8.0])
def test_the_bound_of_a_screened_tile(common: float) -> None:
    """8-bit products estimate t, badly where all rows of weight share a large part: by that much the bound is wider."""
    cpu = load("cpu")
    assert not isinstance(cpu, str)
    tokens, width, vocab = 256, 64, 20000
    sign = 1 - 2 * (torch.arange(vocab) % 2)[:, None]
    axes = torch.linalg.qr(torch.randn(width, 2)).Q
    apart, shared = axes[:, 0], common * axes[:, 1]
    ways = torch.randn(tokens, width)
    ways = torch.nn.functional.normalize(ways - (ways @ apart)[:, None] * apart)
    hidden = (30 * (0.91**0.5 * ways + 0.3 * sign[:tokens] * apart)).bfloat16()
    weight = shared + 0.3 * sign * apart + 0.02 * torch.nn.functional.normalize(torch.randn(vocab, width))
    labels = torch.arange(tokens) * 70 + 11
    weight[labels] = shared + 0.776 * ways - 0.3 * sign[:tokens] * apart
    weight = weight.bfloat16()
    (logps, lse), (kept,), _ = cpu.stream_forward(
        hidden, weight, None, labels, Transform(), (), tokens, TOL, True, 256.0
    )
    assert kept is not None
    logits = hidden.double() @ weight.double().T
    there = torch.zeros(tokens, vocab, dtype=torch.bool)
    there[:, kept.columns] = filled(kept).probs.T > 0
    mine = torch.where(there, (logits - lse[:, None]).exp(), 0)
    mine[torch.arange(tokens), labels] = logps.double().exp()
    probs = torch.softmax(logits, 1)
    lost = torch.where(mine > 0, 0, probs).sum(1)
    off = (kept.dropped - lost).abs()
    assert (off / lost).max() > 0.3 or not common
    error = ((mine - probs) @ weight.double() + kept.dropped[:, None] * kept.mean_row.double()).norm(dim=1)
    bound = hidden_error_bound(torch.ones(tokens), lost + off, weight, kept.mean_row, Transform())
    assert (error <= bound * (1 + 1e-3) + 1e-6).all()


@pytest.mark.skipif(not STREAMS, reason="this CPU has no bf16 products")
def test_streamed_small_entries() -> None:
    """20,000 columns, each 2^-17 of one token and 2^-23.5 of 255: these hold twice the tolerance, so they stay."""
    cpu = load("cpu")
    assert not isinstance(cpu, str)
    tokens, tol = 256, 2.0**-10
    hidden, weight, bias = torch.eye(tokens).bfloat16(), torch.zeros(60000, tokens), torch.full((60000,), -100.0)
    columns = torch.arange(40000, 60000)
    weight[columns, columns % tokens] = 4.5
    bias[columns], bias[0] = -16.3, 0.0
    labels = torch.zeros(tokens, dtype=torch.int64)
    results, (kept,), _ = cpu.stream_forward(
        hidden, weight.bfloat16(), bias, labels, Transform(), (), tokens, tol, True, 256.0
    )
    assert kept is not None and 8000 < len(kept.columns) < 15000 and len(kept.entries) == tokens * len(kept.columns)
    probs = torch.exp(hidden.double() @ weight.double().T + bias.double() - results[1].double()[:, None])
    lost = 1 - probs[:, kept.columns].sum(1)
    torch.testing.assert_close(kept.dropped.double(), lost, rtol=1e-3, atol=1e-6)
    assert 0.9 * tol < kept.dropped.mean() <= 1.001 * tol


@pytest.mark.skipif(not STREAMS, reason="this CPU has no bf16 products")
def test_an_improbable_target_is_not_lost() -> None:
    """Its p is too small for an entry, but the backward has it from its logp: it is no dropped mass."""
    cpu = load("cpu")
    assert not isinstance(cpu, str)
    hidden, weight, bias = torch.zeros(16, 2), torch.zeros(2000, 2), torch.full((2000,), -100.0)
    bias[0], bias[5], bias[7] = 0.0, -12.5, -12.5  # 3.7e-6; the floor is grad_tol / 2^15 = 7.6e-6
    labels = torch.tensor([5] * 15 + [0])
    _, (kept,), _ = cpu.stream_forward(
        hidden.bfloat16(), weight.bfloat16(), bias, labels, Transform(), (), 16, 0.25, True, 256.0
    )
    assert kept is not None and kept.columns.tolist() == [0, 5] and len(kept.entries) == 16
    torch.testing.assert_close(kept.dropped, torch.tensor([3.7267e-6] * 15 + [7.4533e-6]), rtol=1e-3, atol=1e-9)


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
    (logps, lse, entropy), (compact,), _ = cpu.stream_forward(
        hidden, weight, bias, labels, Transform(), ("entropy",), 256, TOL, True, 256.0
    )
    torch.testing.assert_close(logps.double(), truth[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(lse.double(), truth[1], rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(entropy.double(), truth[2], rtol=1e-3, atol=1e-3)
    assert compact is not None and set(labels.tolist()) <= set(compact.columns.tolist())


@pytest.mark.skipif(not STREAMS, reason="this CPU has no bf16 products")
@pytest.mark.parametrize("level", [-1000.0, 300.0, 50000.0])
def test_streamed_far_from_zero(level: float) -> None:
    """All logits shifted by one number: the same P, also where the last vector of tokens is not full."""
    cpu = load("cpu")
    assert not isinstance(cpu, str)
    hidden, weight, labels = peaked(250, 9001, 32)
    hidden, weight, bias = hidden.bfloat16(), weight.bfloat16(), torch.full((9001,), level)
    results, (kept,), _ = cpu.stream_forward(hidden, weight, bias, labels, Transform(), (), 256, TOL, True, 256.0)
    assert kept is not None
    logits = (hidden.double() @ weight.double().T).float() + bias  # as float32 holds them
    probs = torch.softmax(logits.double(), dim=1)[:, kept.columns].T
    there = filled(kept).probs > 0
    error = (filled(kept).probs.double() - probs)[there].abs() / probs[there]
    assert error.mean() < 1.5e-3  # of the rounding to bf16 alone: 1.2e-3
    torch.testing.assert_close(results[1].double(), torch.logsumexp(logits.double(), 1), rtol=1e-6, atol=1e-5)


@pytest.mark.skipif(not STREAMS, reason="this CPU has no bf16 products")
@pytest.mark.parametrize("tol", [TOL, 0.0])
def test_streamed_nan_stays_with_its_token(tol: float) -> None:
    """Whichever vector of tokens it is in; the others' logits are far enough from their targets' to overflow."""
    cpu = load("cpu")
    assert not isinstance(cpu, str)
    for tokens, bad in ((2, 1), (40, 39), (40, 3)):
        hidden, weight = (
            torch.ones(tokens, 2).bfloat16(),
            torch.linspace(-100, 100, 401).bfloat16()[:, None].expand(-1, 2),
        )
        hidden[bad] = torch.nan
        labels = torch.zeros(tokens, dtype=torch.int64)
        (logps, lse), (kept,), _ = cpu.stream_forward(
            hidden, weight.contiguous(), None, labels, Transform(), (), 256, tol, True, 256.0
        )
        truth = torch.log_softmax(hidden.double() @ weight.double().T, 1)[:, 0]
        torch.testing.assert_close(logps.double(), truth, rtol=1e-6, atol=1e-4, equal_nan=True)
        assert kept is None and lse.isnan().sum() == 1


@pytest.mark.skipif(not STREAMS, reason="this CPU has no bf16 products")
def test_streamed_masked_target() -> None:
    """A target of logit -inf is no bound of anything; the rest are far below zero."""
    cpu = load("cpu")
    assert not isinstance(cpu, str)
    hidden, weight, _ = peaked(40, 9001, 16)
    hidden, weight, bias = hidden.bfloat16(), weight.bfloat16(), torch.full((9001,), -1000.0)
    bias[5] = -torch.inf
    labels = torch.full((40,), 5)
    for tol in (TOL, 0.0):
        (logps, lse), _, _ = cpu.stream_forward(hidden, weight, bias, labels, Transform(), (), 256, tol, True, 256.0)
        truth = torch.logsumexp(hidden.double() @ weight.double().T + bias.double(), 1)
        torch.testing.assert_close(lse.double(), truth, rtol=1e-6, atol=1e-4)
        assert (logps == -torch.inf).all()


@pytest.mark.skipif(not STREAMS, reason="this CPU has no bf16 products")
@pytest.mark.parametrize("vocab", [50257, 131072])
def test_streamed_late_column(vocab: int) -> None:
    """One token is sure of a column beyond the first waves, and its target says nothing: the tile stays sparse."""
    cpu = load("cpu")
    assert not isinstance(cpu, str)
    hidden, weight = torch.zeros(256, 2).bfloat16(), torch.zeros(vocab, 2)
    hidden[:255, 0] = hidden[255, 1] = 1.0
    late = vocab * 3 // 10
    weight[7, 0], weight[late, 1], weight[9, 1] = 40.0, 40.0, 10.0
    labels = torch.full((256,), 7)
    labels[255] = 9
    _, (kept,), _ = cpu.stream_forward(hidden, weight.bfloat16(), None, labels, Transform(), (), 256, TOL, True, 256.0)
    assert kept is not None and {7, 9, late} <= set(kept.columns.tolist())


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
    (logps, lse), kept, _ = cpu.stream_forward(hidden, weight, None, labels, transform, (), 96, 2**-6, True, 256.0)
    assert None not in kept
    g = torch.randn(233)
    dx, dw, db = torch.empty(233, 700), torch.full_like(weight, 0.5), torch.full((3001,), 0.5)
    tiles = [(96 * i, compact) for i, compact in enumerate(kept)]
    cpu.stream_backward(hidden, weight, labels, logps, lse, g, transform, tiles, dx, dw, db, add)
    inputs = [
        (
            compaction.Rows(*(x[a : a + 96].double() if x.is_floating_point() else x[a : a + 96] for x in rows)),
            compaction.Compact(*(x.double() if x.is_floating_point() else x for x in filled(compact))),
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


@pytest.mark.skipif(not STREAMS, reason="this CPU has no bf16 products")
@pytest.mark.parametrize("vocab", [3001, 70001])
@pytest.mark.parametrize("keywords", [{}, dict(logit_scale=-0.5, softcap=20.0)], ids=["plain", "softcap"])
def test_streamed_exact_keeps_what_fits(vocab: int, keywords: dict) -> None:
    """Exponentials in place of logits: nearly as accurate as the backward that computes the logits again."""
    hidden, weight, labels = peaked(300, vocab, 64)
    hidden, weight, bias = hidden.bfloat16(), weight.bfloat16(), torch.randn(vocab).bfloat16()
    labels[::7], g = -100, torch.randn(300)
    results = []
    for workspace_mb, kept in ((1.0, 0), (256.0, 1)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        out = linear_token_logps(
            *leaves[:2], labels, bias=leaves[2], grad_tol=0, workspace_mb=workspace_mb, backend="cpu", **keywords
        )
        sizes = [tuple(x.shape) for x in out.logps.grad_fn.saved_tensors if x is not None]
        assert sizes.count((vocab, (labels != -100).sum())) == kept
        first = torch.autograd.grad(out.logps, leaves, g, retain_graph=True)
        results.append(torch.autograd.grad(out.logps, leaves, g))
        assert all(torch.equal(a, b) for a, b in zip(first, results[-1], strict=True))
    truth = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    out = linear_token_logps(*truth[:2], labels, bias=truth[2], **keywords)
    for again, kept, true in zip(*results, torch.autograd.grad(out.logps, truth, g.double()), strict=True):
        assert (kept.double() - true).norm() < 2 * (again.double() - true).norm() + 1e-6 * true.norm()


@pytest.mark.skipif(not STREAMS, reason="this CPU has no bf16 products")
def test_streamed_exponentials_out_of_range() -> None:
    """Logits thousands above the target's: nothing is kept, the backward computes them again."""
    hidden, weight, labels = peaked(20, 40000, 16, sharp=300.0)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    labels[:10] = (hidden[:10].float() @ weight.float().T).argmin(1)
    g = torch.randn(20)
    _, _, dx, dw = gradients(hidden, weight, labels, g, grad_tol=0, backend="cpu")
    true = gradients(hidden.double(), weight.double(), labels, g.double())
    assert (dx.double() - true[2]).norm() < 1e-2 * true[2].norm()
    assert (dw.double() - true[3]).norm() < 1e-2 * true[3].norm()
