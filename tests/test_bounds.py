"""No kernel reads or writes beyond its tensors: what lies around them is NaN, and stays NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdpo.backend import BACKENDS, choose
from fastdpo.options import Transform

PLAIN, CAPPED = Transform(), Transform(0.5, 20.0, 0.8)
SHAPES = [(1, 1), (3, 7), (5, 64), (4, 1003), (2, 4099), (17, 130)]
STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
ROOM = 64  # elements on either side of a tensor


class Guards:
    """Tensors in the middle of larger ones that hold NaN (integers: a number that is no index)."""

    def __init__(self) -> None:
        self.around: list[tuple[Tensor, Tensor]] = []

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of it, dense, between guards."""
        bad = float("nan") if tensor.is_floating_point() else -(2**30)
        whole = torch.full((tensor.numel() + 2 * ROOM,), bad, dtype=tensor.dtype)
        inside = whole[ROOM : ROOM + tensor.numel()].view(tensor.shape)
        inside.copy_(tensor)
        self.around.append((whole, inside))
        return inside

    def check(self) -> None:
        for whole, inside in self.around:
            edges = torch.cat([whole[:ROOM], whole[ROOM + inside.numel() :]])
            untouched = edges.isnan() if edges.is_floating_point() else edges == -(2**30)
            assert untouched.all(), f"written beside a tensor of {list(inside.shape)}"


@pytest.fixture
def kernels(backend: str, request: pytest.FixtureRequest) -> Callable[[torch.dtype], object]:
    def of(dtype: torch.dtype) -> object:
        assert dtype in BACKENDS[backend].dtypes
        return choose(backend, torch.device("cpu"), dtype)

    return of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "softcap"])
def test_rows(kernels, dtype: torch.dtype, shape: tuple[int, int], transform: Transform) -> None:
    module, guards = kernels(dtype), Guards()
    rows, vocab = shape
    logits = guards.put((torch.randn(1, rows, vocab) * 3).to(dtype))
    targets = torch.randint(0, vocab, (rows,))
    targets[rows // 2] = -1 if rows > 1 else targets[0]
    targets = guards.put(targets)
    found = module.row_forward(logits, targets, transform, STATS)
    assert all(value.isfinite().all() for value in found), "a number from outside"
    logps, lse, entropy = (guards.put(value) for value in found[:3])
    weights, others = guards.put(torch.randn(rows)), guards.put(torch.randn(rows))
    out = guards.put(torch.zeros(1, rows, vocab, dtype=dtype))
    module.row_backward(logits, targets, logps, lse, entropy, weights, others, transform, 0, out)
    assert out.isfinite().all()
    module.row_backward(logits, targets, logps, lse, entropy, weights, others, transform, 0, logits)
    assert torch.equal(logits, out)
    guards.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_columns(kernels, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    module, guards = kernels(dtype), Guards()
    rows, vocab = shape
    logits = guards.put((torch.randn(rows, vocab) * 3).to(dtype))
    targets = guards.put(torch.randint(0, vocab, (rows,)))
    logps, lse = (guards.put(x) for x in module.row_forward(logits[None], targets, PLAIN, ()))
    mass = module.column_mass(logits, lse, PLAIN)
    torch.testing.assert_close(mass.sum().item(), float(rows), rtol=1e-3, atol=0)
    keep = torch.zeros(vocab, dtype=torch.bool)
    keep[:: max(1, vocab // 9)] = True
    keep[targets] = True
    columns = guards.put(keep.nonzero().squeeze(1).int())
    probs, dropped = module.column_probs(logits, lse, columns, PLAIN)
    assert probs.isfinite().all() and (dropped >= 0).all() and (dropped <= 1).all()
    weights = guards.put(torch.randn(rows))
    gradient = module.compact_gradient(guards.put(probs), columns, targets, logps, lse, weights, PLAIN)
    assert gradient.isfinite().all()
    hidden = guards.put(torch.randn(rows, 6).to(dtype))
    total = guards.put(torch.zeros(len(columns), 6))
    module.add_weight_gradient(total, torch.arange(len(columns)), gradient, hidden)
    assert total.isfinite().all()
    guards.check()


@pytest.mark.parametrize("lengths", [[1, 1], [0, 3, 2, 0], [130, 1, 0, 1000]], ids=str)
def test_sequences(kernels, lengths: list[int]) -> None:
    module, guards = kernels(torch.float32), Guards()
    bounds = guards.put(torch.tensor([0, *lengths]).cumsum(0))
    logps, ref = guards.put(-torch.rand(sum(lengths))), guards.put(-torch.rand(len(lengths)))
    assert module.sequence_sums(logps, bounds).isfinite().all()
    assert all(x.isfinite().all() for x in module.pair_sigmoid(logps, bounds, ref, 0.1, 0.1))
    guards.check()


@pytest.mark.parametrize("shape", [(1, 8, 5), (33, 16, 1003), (300, 34, 4099)], ids=str)
@pytest.mark.parametrize("tol", [0.0, 2.0**-10])
def test_streamed(shape: tuple[int, int, int], tol: float) -> None:
    """From hidden states, where this CPU streams."""
    from fastdpo import linear_token_logps
    from fastdpo.backend import load

    module = load("cpu")
    if isinstance(module, str) or not module.streams():
        pytest.skip("no bf16 products here")
    guards = Guards()
    rows, width, vocab = shape
    hidden = guards.put((torch.randn(rows, width)).bfloat16())
    weight = guards.put((torch.randn(vocab, width) * 2).bfloat16())
    bias, labels = guards.put(torch.randn(vocab).bfloat16()), guards.put(torch.randint(0, vocab, (rows,)))
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    out = linear_token_logps(*leaves[:2], labels, bias=leaves[2], grad_tol=tol, backend="cpu")
    assert out.logps.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.logps.sum(), leaves))
    guards.check()
