"""What only the Triton kernels can get wrong: alignment, split rows, bytes moved. Values at large: test_kernels.py."""

from __future__ import annotations

import itertools
import mmap

import numpy as np
import pytest
import torch
from close import assert_close
from torch import Tensor

from fastdpo import eager
from fastdpo.backend import load
from fastdpo.options import Transform

if isinstance(load("triton"), str):
    pytest.skip(f"triton: {load('triton')}", allow_module_level=True)

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from benchmarks.gpu_counter import counted
from fastdpo import gpu

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def rounds_once() -> bool:
    """Whether the interpreter's fma does, as a GPU's: (1 + e)^2 - (1 + 2e) is e^2, which a rounded product has lost."""
    e = 2.0**-12
    x, y = (TensorHandle(np.array([value], np.float32), tl.float32) for value in (1 + e, -(1 + 2 * e)))
    return InterpreterBuilder().create_fma(x, x, y).data[0] == e * e


FUSED = pytest.mark.skipif(not rounds_once(), reason="this Triton's interpreter rounds the product of an fma")


def close(result: Tensor, true: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(result.double(), true.double(), rtol=tolerance, atol=tolerance)


def check(logits: Tensor, targets: Tensor, transform: Transform, out: Tensor | None = None) -> None:
    """Forward with all stats and backward of both gradients against eager in float64."""
    results = gpu.row_forward(logits, targets, transform, STATS)
    truth = eager.row_forward(logits.double(), targets, transform, STATS)
    for result, true in zip(results, truth, strict=True):
        close(result, true)
    grads = [torch.randn(len(targets)) for _ in range(2)]
    true_out = torch.empty(logits.shape, dtype=torch.float64)
    eager.row_backward(logits.double(), targets, *truth[:3], *(g.double() for g in grads), transform, 0, true_out)
    out = torch.empty_like(logits) if out is None else out
    gpu.row_backward(logits, targets, *results[:3], *grads, transform, 0, out)
    close(out, true_out, 2e-3 if logits.dtype == torch.float16 else 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "vocab"), [(2, 9001), (10, 2051), (10, 4096)], ids=["split", "odd", "aligned"])
def test_every_alignment(dtype: torch.dtype, rows: int, vocab: int) -> None:
    """Rows that start off a 16-byte boundary; the target in the head, body and tail; out aligned otherwise."""
    for offset in (0, 1, 7):
        storage = torch.randn(offset + 2 * rows * vocab).to(dtype)
        logits = storage[offset : offset + rows * vocab].view(1, rows, vocab)
        targets = torch.randint(0, vocab, (rows,))
        targets[:2] = torch.tensor([0, vocab - 1])
        logits[0, 0, 0] = 9  # is_top1 in the head
        if rows > 2:
            targets[2] = -1
        elsewhere = torch.empty(3 + rows * vocab, dtype=dtype)[3:].view(1, rows, vocab)
        check(logits, targets, Transform(), elsewhere)
        check(logits, targets, Transform(), logits)  # overwrites the logits: last


@pytest.mark.parametrize("transform", [Transform(0.0625), Transform(1.0, 30.0, 0.7), Transform(-1.0), Transform(0.0)])
def test_transforms(transform: Transform) -> None:
    logits = torch.randn(2, 5, 1003) * 20
    targets = torch.randint(0, 1003, (10,))
    targets[:2] = torch.tensor([-1, 0])
    check(logits, targets, transform)


@FUSED
def test_ties_and_extremes() -> None:
    """The first maximum is the top 1; logits of 1e4 and -inf, whose p log p is 0."""
    logits = torch.randn(1, 8, 5001).clamp(max=3)
    targets = torch.full((8,), 2500)
    logits[0, :4, 2500] = 5
    logits[0, 1, 2499] = 5  # earlier, in the target's block
    logits[0, 2, 3] = 5  # earlier, in another block
    logits[0, 3, 2501] = 5  # later: does not count
    logits[0, 4] *= 1e4
    logits[0, 5, :4000] = -torch.inf
    logits[0, 6, :] = -1e4
    logits[0, 7, 17] = 1e4
    targets[5] = 4500
    assert gpu.row_forward(logits, targets, Transform(), ("is_top1",))[2].tolist()[:4] == [True, False, False, True]
    check(logits, targets, Transform())
    few = logits[:, 1:3]  # two rows are split
    assert not gpu.row_forward(few, targets[1:3], Transform(), ("is_top1",))[2].any()


def test_saturated_softcap() -> None:
    logits = torch.tensor([1e4, -1e4, 1e-3, 0.0, 500.0]).repeat(1, 8, 400)
    check(logits, torch.arange(8), Transform(1.0, 30.0, 1.0))


def test_targets_in_a_window() -> None:
    """A window's gradients are the columns of the whole, whichever program or edge holds the target."""
    logits, targets = (
        torch.randn(1, 12, 3001),
        torch.tensor([0, 999, 1000, 1001, 1003, 1500, 2000, 2500, 2801, 2802, -1, 7]),
    )
    logps, lse = gpu.row_forward(logits, targets, Transform(), ())
    g = torch.randn(12)
    whole, window = torch.empty_like(logits), torch.empty(1, 12, 1802)
    gpu.row_backward(logits, targets, logps, lse, None, g, None, Transform(), 0, whole)
    gpu.row_backward(logits[..., 1000:2802], targets, logps, lse, None, g, None, Transform(), 1000, window)
    assert torch.equal(window, whole[..., 1000:2802])


# --- compaction ------------------------------------------------------------------------------------------------------

PLAIN, GRANITE, GEMMA = Transform(), Transform(0.25), Transform(-1.0, 30.0, 0.7)


def tile(rows: int, vocab: int, transform: Transform, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Logits, targets (one twice), and from eager in float64 logps and lse."""
    logits = (torch.randn(rows, vocab) * 4).to(dtype)
    targets = torch.randint(0, vocab, (rows,))
    targets[-1] = targets[0]
    logps, lse = eager.row_forward(logits.double()[None], targets, transform, ())
    return logits, targets, logps, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("transform", [PLAIN, GRANITE, GEMMA], ids=["plain", "scale", "softcap"])
@pytest.mark.parametrize(
    ("rows", "vocab"), [(1, 1003), (5, 7), (37, 1024), (70, 515), (40, 1020)], ids=lambda size: str(size)
)
def test_column_mass(dtype: torch.dtype, transform: Transform, rows: int, vocab: int) -> None:
    """Few rows and many, aligned and odd V; n no multiple of the block; a period of 2 (V = 1020); bits that stay."""
    logits, _, _, lse = tile(rows, vocab, transform, dtype)
    mass = gpu.column_mass(logits, lse.float(), transform)
    close(mass, eager.column_mass(logits.double(), lse, transform), 2e-5)
    assert mass.sum().item() == pytest.approx(rows, rel=1e-5)
    assert torch.equal(mass, gpu.column_mass(logits.clone(), lse.float(), transform))
    storage = torch.randn(3 + rows * (vocab + 5)).to(dtype)  # rows that start off the boundary, of a longer row
    view = storage[3:].view(rows, vocab + 5)[:, :vocab]
    view.copy_(logits)
    close(gpu.column_mass(view, lse.float(), transform), mass.double(), 1e-6)


@FUSED
def test_column_mass_of_extremes() -> None:
    """lse in the thousands, whose product with log2 e rounds; -inf logits hold no mass; no rows, no mass."""
    logits, _, _, _ = tile(20, 300, PLAIN)
    logits += torch.linspace(-3000, 3000, 20)[:, None]
    logits[:, 7] = -torch.inf
    lse = torch.logsumexp(logits.double(), 1)
    mass = gpu.column_mass(logits, lse.float(), PLAIN)
    torch.testing.assert_close(
        mass.double(), eager.column_mass(logits.double(), lse.float().double(), PLAIN), rtol=1e-5, atol=0
    )
    assert mass[7] == 0
    assert not gpu.column_mass(logits[:0], lse[:0].float(), PLAIN).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("transform", [PLAIN, GRANITE, GEMMA], ids=["plain", "scale", "softcap"])
@pytest.mark.parametrize(("rows", "kept"), [(1, 40), (37, 33), (72, 100), (64, 1), (9, 0)])
def test_column_probs_and_gradient(dtype: torch.dtype, transform: Transform, rows: int, kept: int) -> None:
    """P, what it leaves out, and D with the target's column; ragged tiles, one column and none, targets not kept."""
    logits, targets, logps, lse = tile(rows, 501, transform, dtype)
    columns = torch.randperm(501)[:kept]
    if kept > 1:
        columns[: rows // 2] = targets[: min(kept, rows // 2)]
        columns = columns.unique()
    columns = columns.sort().values.int()
    rows_of = (targets, logps, lse, torch.randn(rows, dtype=torch.float64))
    floats = (targets, *(x.float() for x in rows_of[1:]))

    probs, dropped = gpu.column_probs(logits, lse.float(), columns, transform)
    true_probs, true_dropped = eager.column_probs(logits.double(), lse, columns, transform)
    plain = eager.column_probs(logits, lse.float(), columns, transform)
    assert probs.dtype == dtype and probs.is_contiguous() and dropped.dtype == torch.float32
    assert_close(probs, true_probs, plain[0])
    assert_close(dropped, true_dropped, plain[1], unit=1)

    gradient = gpu.compact_gradient(probs, columns, *floats, transform)
    truth = eager.compact_gradient(true_probs, columns, *rows_of, transform)
    assert gradient.dtype == dtype
    assert_close(gradient, truth, eager.compact_gradient(plain[0], columns, *floats, transform))
    some = slice(kept // 3, kept)  # a range of columns, as the sum of dW takes them
    assert torch.equal(gpu.compact_gradient(probs[some], columns[some], *floats, transform), gradient[some])


@FUSED
def test_small_dropped_mass() -> None:
    """Below 1e-7, where a float32 sum of P is exactly 1."""
    logits = torch.full((3, 2000), -40.0)
    logits[:, :1000] = torch.tensor([0.0, -20.0, 3.0])[:, None]
    logits[:, 1000] = torch.tensor([-9.8, -30.0, -10.0])
    lse = torch.logsumexp(logits.double(), 1)
    lse32 = lse.float()
    _, dropped = gpu.column_probs(logits, lse32, torch.arange(1000).int(), PLAIN)
    # lse itself is rounded: what is left out of the sum of exp(z - lse) as it is in float32
    true = (1 - (logits[:, :1000].double() - lse32[:, None].double()).exp().sum(1)).clamp(min=0)
    torch.testing.assert_close(dropped.double(), true, rtol=0, atol=6e-8)


def test_more_than_2_31_logits() -> None:
    """Rows 2^31 logits apart; of the 4 GB between them, no page is touched."""
    apart = 2**31 + 8
    memory = mmap.mmap(-1, 2 * (apart + 400), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided((2, 301), (apart, 1))
    logits, targets, logps, lse = tile(2, 301, PLAIN, torch.float16)
    far.copy_(logits)
    with pytest.MonkeyPatch.context() as patch:
        # The interpreter copies an argument's whole storage back onto itself
        patch.setattr(torch.UntypedStorage, "copy_", lambda storage, *_: storage)
        close(gpu.column_mass(far, lse.float(), PLAIN), eager.column_mass(logits.double(), lse, PLAIN))
        columns = targets.unique().int()
        probs, _ = gpu.column_probs(far, lse.float(), columns, PLAIN)
        close(probs, eager.column_probs(logits, lse.float(), columns, PLAIN)[0], 1e-3)
        close(gpu.row_forward(far[None], targets, PLAIN, ())[0], logps)
        g = torch.ones(2)
        gpu.row_backward(far[None], targets, logps.float(), lse.float(), None, g, None, PLAIN, 0, far[None])
        true = torch.empty(1, 2, 301, dtype=torch.float64)
        eager.row_backward(logits.double()[None], targets, logps, lse, None, g.double(), None, PLAIN, 0, true)
        close(far, true[0], 1e-3)


# --- bytes and programs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 9], ids=["split", "whole"])
def test_bytes_moved(rows: int) -> None:
    """Each logit is read once forward; read once and written once backward; an ignored row is not read."""
    vocab = 20011
    logits, targets = torch.randn(1, rows, vocab).half(), torch.randint(0, vocab, (rows,))
    with counted() as moved:
        results = gpu.row_forward(logits, targets, Transform(), STATS)
    assert 2 * rows * vocab <= moved.loaded.total() <= 2.02 * rows * vocab
    g = torch.ones(rows)
    with counted() as moved:
        gpu.row_backward(logits, targets, *results[:3], g, g, Transform(), 0, logits)
    assert moved.stored.total() == 2 * rows * vocab
    assert 2 * rows * vocab <= moved.loaded.total() <= 2.02 * rows * vocab

    ignored = torch.full_like(targets, -1)
    with counted() as moved:
        results = gpu.row_forward(logits, ignored, Transform(), STATS)
        gpu.row_backward(logits, ignored, *results[:3], g, g, Transform(), 0, logits)
    assert moved.loaded.total() < 1000
    assert moved.stored.total() <= 2.02 * rows * vocab
    assert not logits.any()
    assert not any(r.any() for r in results)


@pytest.mark.parametrize("vocab", [2048, 2051], ids=["aligned", "odd"])
def test_bytes_moved_by_compaction(vocab: int) -> None:
    """Mass: each logit once. P: the kept ones alone, each P once; D: P once in, once out."""
    logits, targets, logps, lse = tile(32, vocab, PLAIN, torch.float16)
    logps, lse = logps.float(), lse.float()
    with counted() as moved:
        gpu.column_mass(logits, lse, PLAIN)
    assert 2 * 32 * vocab <= moved.loaded.total() <= 2.1 * 32 * vocab
    assert moved.stored.total() <= 4 * 8 * vocab  # eight splits where V is odd
    columns = torch.randperm(vocab)[:100].sort().values.int()
    with counted() as moved:
        probs, _ = gpu.column_probs(logits, lse, columns, PLAIN)
    assert moved.loaded["logits"] == moved.stored["probs"] == 2 * 32 * 100
    assert moved.loaded.total() <= 2 * 32 * 100 + 4 * (100 + 4 * 32)
    assert moved.stored.total() <= 2 * 32 * 100 + 4 * 8 * 32
    with counted() as moved:
        gpu.compact_gradient(probs, columns, targets, logps, lse, torch.ones(32), PLAIN)
    assert moved.loaded["probs"] == moved.stored["gradient"] == moved.stored.total() == 2 * 32 * 100
    assert moved.loaded.total() <= 2 * 32 * 100 + 4 * 100 + 7 * 16 * 32


def test_grid_covers_every_column_once() -> None:
    """launch.py's cuts: no column is left, whatever the vocabulary and the number of rows."""
    from fastdpo.gpu import launch

    for rows, vocab in itertools.product((1, 3, 8, 1000), (1, 2047, 2048, 2049, 50257, 262144)):
        logits = torch.empty(1, 1, vocab, dtype=torch.float16).expand(1, rows, vocab)
        for plan in (launch.forward_plan(logits, rows), launch.backward_plan(logits, logits, rows)):
            assert plan.span % plan.shape["BLOCK"] == 0
            assert plan.span * plan.programs >= vocab > plan.span * (plan.programs - 1)
        mass = launch.mass_plan(logits[0])
        assert mass.windows * mass.shape["COLS"] >= vocab + (vocab % 8 != 0) * 7
        assert mass.splits * logits.stride(1) % 8 == 0  # a split's rows are alike
