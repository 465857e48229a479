"""The four kernels of each backend against float64: values, statistics, gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from close import assert_close
from heads import skip_unfit
from torch import Tensor

from fastdpo import eager
from fastdpo.backend import choose
from fastdpo.options import Transform

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
PLAIN, GEMMA, GRANITE = Transform(), Transform(1.0, 30.0, 0.7), Transform(0.25, None, 1.0)
# aligned; ragged; one column; ragged beyond 2^16 (a prime); Phi's vocabulary
VOCABS = [2048, 1003, 1, 65537, pytest.param(129920, marks=pytest.mark.slow)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def kernels_for(backend: str, dtype: torch.dtype):
    skip_unfit(backend, dtype)
    return choose(backend, torch.device("cpu"), dtype)


def batch(vocab: int, dtype: torch.dtype, rows: int = 6, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits [2, rows/2, V] and targets with one ignored row and one row predicted right."""
    logits = (torch.randn(2, rows // 2, vocab) * scale).to(dtype)
    targets = torch.randint(0, vocab, (rows,))
    targets[0] = logits[0, 0].argmax()
    targets[1] = -1
    return logits, targets


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("transform", [PLAIN, GEMMA, GRANITE], ids=["plain", "softcap", "scale"])
def test_row_forward(backend: str, dtype: torch.dtype, vocab: int, transform: Transform) -> None:
    kernels = kernels_for(backend, dtype)
    logits, targets = batch(vocab, dtype)
    truth = eager.row_forward(logits.double(), targets, transform, STATS)
    plain = eager.row_forward(logits, targets, transform, STATS)
    results = kernels.row_forward(logits, targets, transform, STATS)
    for name, result, true, yardstick in zip(("logps", "lse", *STATS), results, truth, plain, strict=True):
        if name == "is_top1":
            assert torch.equal(result, true)
            assert result[0] and not result[1]
        else:
            assert result.dtype == torch.float32
            assert_close(result, true, yardstick, unit=1)
            assert result[1] == 0  # ignored
    alone = kernels.row_forward(logits, targets, transform, ())
    assert len(alone) == 2
    assert_close(alone[0], truth[0], plain[0], unit=1)


@pytest.mark.parametrize("transform", [PLAIN, GEMMA], ids=["plain", "softcap"])
@pytest.mark.parametrize("vocab", [2048, 1003, 1])
def test_a_target_on_another_rank(backend: str, vocab: int, transform: Transform) -> None:
    """V as a target: its logit counts as 0, and no column of the gradient is its."""
    kernels = kernels_for(backend, torch.float32)
    logits, targets = batch(vocab, torch.float32)
    elsewhere = torch.where(targets < 0, targets, vocab)
    stats = ("entropy", "mean_logits", "log_sum_sq_probs")
    here, there = (kernels.row_forward(logits, y, transform, stats) for y in (targets, elsewhere))
    assert torch.equal(there[0], -there[1])
    for result, same in zip(there[1:], here[1:], strict=True):
        torch.testing.assert_close(result, same)
    grad = torch.empty_like(logits)
    weights = torch.randn(len(targets))
    kernels.row_backward(logits, elsewhere, there[0], there[1], None, weights, None, transform, 0, grad)
    truth = logits.double().requires_grad_()
    eager.row_forward(truth, elsewhere, transform, ())  # the specification knows it too
    z = eager.transformed(truth, transform)[0].flatten(0, 1)
    counted = (targets >= 0).double()
    (-(z.logsumexp(1)) * weights * counted).sum().backward()
    torch.testing.assert_close(grad, truth.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("transform", [PLAIN, GEMMA, GRANITE], ids=["plain", "softcap", "scale"])
@pytest.mark.parametrize("with_entropy", [False, True], ids=["logps", "logps+entropy"])
def test_row_backward(backend: str, dtype: torch.dtype, vocab: int, transform: Transform, with_entropy: bool) -> None:
    kernels = kernels_for(backend, dtype)
    logits, targets = batch(vocab, dtype)
    logps, lse, entropy = eager.row_forward(logits.double(), targets, transform, ("entropy",))
    g, h = torch.randn(len(targets)), torch.randn(len(targets)) if with_entropy else None

    def run(module, logits: Tensor, in_place: bool = False) -> Tensor:
        kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
        given = [None if x is None else x.to(kind) for x in (logps, lse, entropy if with_entropy else None, g, h)]
        out = logits if in_place else torch.empty_like(logits)
        module.row_backward(logits, targets, *given, transform, 0, out)
        return out

    truth = run(eager, logits.double())
    result = run(kernels, logits)
    assert_close(result, truth, run(eager, logits))
    assert result.view(len(targets), vocab)[1].count_nonzero() == 0  # ignored
    assert torch.equal(run(kernels, logits.clone(), in_place=True), result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strided_and_windowed(backend: str, dtype: torch.dtype) -> None:
    """A slice of a larger tensor; columns 500.. of the vocabulary, with targets inside, before and after."""
    kernels = kernels_for(backend, dtype)
    whole = (torch.randn(2, 5, 1003) * 3).to(dtype)
    logits = whole[:, :-1]
    targets = torch.randint(0, 1003, (8,))
    targets[:3] = torch.tensor([-1, 3, 700])
    logps, lse = kernels.row_forward(logits, targets, PLAIN, ())
    assert torch.equal(logps, kernels.row_forward(logits.contiguous(), targets, PLAIN, ())[0])
    g = torch.randn(8)
    full = torch.empty_like(logits.contiguous())
    kernels.row_backward(logits, targets, logps, lse, None, g, None, PLAIN, 0, full)
    window = torch.empty(2, 4, 300, dtype=dtype)
    kernels.row_backward(logits[..., 500:800], targets, logps, lse, None, g, None, PLAIN, 500, window)
    torch.testing.assert_close(window, full[..., 500:800])
    last = whole[:, -1].clone()
    kernels.row_backward(logits, targets, logps, lse, None, g, None, PLAIN, 0, logits)
    assert torch.equal(logits, full)
    assert torch.equal(whole[:, -1], last)  # outside the slice: untouched


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_extreme_logits(backend: str, scale: float) -> None:
    """Flat and one-hot rows, -inf columns (a masked vocabulary), a target far below the maximum."""
    kernels = kernels_for(backend, torch.float32)
    logits, targets = batch(5000, torch.float32, scale=scale)
    logits[0, 2, 100:4000] = -torch.inf
    targets[2] = 7
    logits[1, 0, :4999] = -torch.inf
    targets[3] = 4999
    truth = eager.row_forward(logits.double(), targets, PLAIN, ("entropy", "log_sum_sq_probs"))
    plain = eager.row_forward(logits, targets, PLAIN, ("entropy", "log_sum_sq_probs"))
    results = kernels.row_forward(logits, targets, PLAIN, ("entropy", "log_sum_sq_probs"))
    for result, true, yardstick in zip(results, truth, plain, strict=True):
        assert_close(result, true, yardstick, unit=1)
    out = torch.empty_like(logits)
    grads = (results[0], results[1], results[2], torch.ones(6), torch.ones(6))
    kernels.row_backward(logits, targets, *grads, PLAIN, 0, out)
    assert torch.isfinite(out).all()
    assert out[0, 2, 100:4000].count_nonzero() == 0


def test_no_rows(backend: str) -> None:
    kernels = kernels_for(backend, torch.float32)
    results = kernels.row_forward(torch.empty(2, 0, 11), torch.empty(0, dtype=torch.int64), PLAIN, STATS)
    assert [tuple(r.shape) for r in results] == [(0,)] * 6
    empty = torch.empty(0)
    kernels.row_backward(
        torch.empty(2, 0, 11), empty.long(), empty, empty, None, empty, None, PLAIN, 0, torch.empty(2, 0, 11)
    )


@pytest.mark.parametrize("rows", [1, 3, 700])
def test_few_and_many_rows(backend: str, rows: int) -> None:
    """Kernels may split a row over programs where rows are few."""
    kernels = kernels_for(backend, torch.float32)
    vocab = 20011 if rows < 10 else 130
    logits, targets = torch.randn(1, rows, vocab), torch.randint(0, vocab, (rows,))
    truth = eager.row_forward(logits.double(), targets, PLAIN, STATS)
    for result, true in zip(kernels.row_forward(logits, targets, PLAIN, STATS), truth, strict=True):
        torch.testing.assert_close(result.double(), true.double(), rtol=1e-5, atol=1e-5)


def test_same_inputs_same_bits(backend: str) -> None:
    kernels = kernels_for(backend, torch.float32)
    logits, targets = batch(1003, torch.float32)
    first = kernels.row_forward(logits, targets, PLAIN, STATS)
    again = kernels.row_forward(logits.clone(), targets.clone(), PLAIN, STATS)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


BOUNDS = torch.tensor([0, 3, 3, 10, 2000])  # one short, one empty, one, one long sequence


def test_sequence_sums(backend: str) -> None:
    values = -torch.rand(2000) * 10
    result = kernels_for(backend, torch.float32).sequence_sums(values, BOUNDS)
    true = torch.stack([values[a:b].double().sum() for a, b in itertools.pairwise(BOUNDS)])
    torch.testing.assert_close(result.double(), true, rtol=3e-7, atol=0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("referenced", [True, False])
@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_pair_sigmoid(backend: str, label_smoothing: float, referenced: bool, beta: float) -> None:
    """The fused pair kernel equals the table's loss and its autograd slope, also where the sigmoid saturates."""
    logps = -torch.rand(2000) * 3
    ref = torch.tensor([-6.0, -0.5, -9.0, -3000.0]) if referenced else None
    loss, sums, slope = kernels_for(backend, torch.float32).pair_sigmoid(logps, BOUNDS, ref, beta, label_smoothing)

    from fastdpo.losses import LOSSES, LossOptions, Pairs

    leaf = eager.sequence_sums(logps.double(), BOUNDS).requires_grad_()
    pairs = Pairs.split(leaf, None if ref is None else ref.double(), torch.ones(4))
    true = LOSSES["sigmoid"](pairs, LossOptions(beta, label_smoothing)).mean()
    (true_slope,) = torch.autograd.grad(true, leaf)
    torch.testing.assert_close(sums.double(), leaf.detach(), rtol=3e-7, atol=0)
    torch.testing.assert_close(loss.double(), true.detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(slope.double(), true_slope, rtol=2e-5, atol=1e-6)
