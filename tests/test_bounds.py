"""No kernel reads or writes beyond its tensors: what lies around them is NaN, and stays NaN; or it is no memory."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from compaction_kit import TOL, kept
from heads import peaked, skip_unfit
from torch import Tensor

from fastdpo import linear_token_logps
from fastdpo.backend import choose, load
from fastdpo.compaction import Sparse
from fastdpo.options import Transform
from fastdpo.saved import Exponentials

PLAIN, CAPPED, SHARP = Transform(), Transform(0.5, 20.0, 0.8), Transform(0.9, 60.0, 0.7)
SHAPES = [(1, 1), (3, 7), (5, 64), (4, 1003), (2, 4099)]
STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
ROOM = 8192  # elements on either side of a tensor: a store of a whole block stays within
INTEGER = -(2**30)  # no index
EDGE = os.environ.get("FASTDPO_TEST_EDGE")  # of memory: "end" or "start"; in the child that these tests are repeated in
STREAMS = not isinstance(load("cpu"), str) and load("cpu").streams()  # type: ignore[union-attr]


class Guards:
    """Tensors in the middle of larger ones that hold NaN (integers: a number that is no index)."""

    def __init__(self) -> None:
        self.around: list[tuple[Tensor, Tensor]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Dense, between guards; itself as they are."""
        size = torch.Size(shape).numel()
        bad = float("nan") if dtype.is_floating_point else dtype == torch.bool or max(INTEGER, torch.iinfo(dtype).min)
        whole = torch.full((size + 2 * ROOM,), bad, dtype=dtype)
        inside = whole[ROOM : ROOM + size].view(shape)
        self.around.append((whole, inside))
        return inside

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of it."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def hold(self, tensor: Tensor) -> bool:
        return any(tensor.data_ptr() == inside.data_ptr() for _, inside in self.around)

    def check(self) -> None:
        for whole, inside in self.around:
            edges = torch.cat([whole[:ROOM], whole[ROOM + inside.numel() :]])
            untouched = edges.isnan() if edges.is_floating_point() else edges == edges[0]
            assert untouched.all(), f"written beside a tensor of {list(inside.shape)}"


class Pages(Guards):
    """Tensors at the edge of memory: to touch what lies beyond, if only to read it, is a segmentation fault."""

    BEYOND = 1 << 20  # bytes

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        if not size:
            return torch.empty(shape, dtype=dtype)
        used = -(-size * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, used + 2 * self.BEYOND)
        first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for address in (first, first + self.BEYOND + used):
            no_access = ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address), self.BEYOND, 0)
            assert no_access == 0, os.strerror(ctypes.get_errno())
        start = self.BEYOND + (used - size * dtype.itemsize if EDGE == "end" else 0)
        inside = torch.frombuffer(memory, dtype=dtype, count=size, offset=start).view(shape)
        self.around.append((inside, inside))
        return inside.fill_(float("nan") if dtype.is_floating_point else True)

    def check(self) -> None:
        pass


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guards]:
    """What tiles.py and the Triton launches allocate is guarded too."""
    found = Pages() if EDGE else Guards()

    def new(fill: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        def made(like: Tensor, *shape: int | tuple[int, ...], dtype: torch.dtype | None = None, **_: object) -> Tensor:
            size = torch.Size(shape[0] if shape and not isinstance(shape[0], int) else shape)
            dtype = dtype or like.dtype
            return fill(found.empty(size, dtype)) if size.numel() else torch.empty(size, dtype=dtype)

        return made

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new(lambda x: x))
        patch.setattr(torch.Tensor, "new_zeros", new(Tensor.zero_))
        patch.setattr(torch, "empty_like", lambda like, **_: found.empty(like.shape, like.dtype))
        yield found
    found.check()


@pytest.fixture
def kernels(backend: str) -> Callable[[torch.dtype], ModuleType]:
    def of(dtype: torch.dtype) -> ModuleType:
        skip_unfit(backend, dtype)
        return choose(backend, torch.device("cpu"), dtype)

    return of


def test_a_block_stays_within_the_guard() -> None:
    if isinstance(load("triton"), str):
        pytest.skip(f"triton: {load('triton')}")
    from fastdpo.gpu import launch

    blocks = [launch.block_shape(size, 32, narrow)["BLOCK"] for size in (2, 4) for narrow in (False, True)]
    blocks += [math.prod(tile) for tile in (launch.GATHER_TILE, launch.GRADIENT_TILE)]
    assert max(*blocks, launch.SEQUENCE_BLOCK) <= ROOM


KINDS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@KINDS
@pytest.mark.parametrize("shape", [*SHAPES, (9, 130), (2, 16397)], ids=str)
@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "softcap"])
def test_rows(backend, kernels, guards, dtype: torch.dtype, shape: tuple[int, int], transform: Transform) -> None:
    """The last shape: two programs share a row of Triton's forward."""
    module = kernels(dtype)
    rows, vocab = shape
    logits = guards.put((torch.randn(1, rows, vocab) * 3).to(dtype))
    targets = torch.randint(0, vocab, (rows,))
    targets[rows // 2] = -1 if rows > 1 else targets[0]
    targets = guards.put(targets)
    found = module.row_forward(logits, targets, transform, STATS)
    assert backend != "triton" or all(guards.hold(value) for value in found)
    assert all(value.isfinite().all() for value in found), "a number from outside"
    logps, lse, entropy = (guards.put(value) for value in found[:3])
    weights, others = guards.put(torch.randn(rows)), guards.put(torch.randn(rows))
    out = guards.put(torch.zeros(1, rows, vocab, dtype=dtype))
    module.row_backward(logits, targets, logps, lse, entropy, weights, others, transform, 0, out)
    assert out.isfinite().all()
    module.row_backward(logits, targets, logps, lse, entropy, weights, others, transform, 0, logits)
    assert torch.equal(logits, out)


@KINDS
@pytest.mark.parametrize("shape", [*SHAPES, (17, 130)], ids=str)
def test_columns(backend, kernels, guards, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    module = kernels(dtype)
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
    assert backend != "triton" or (guards.hold(probs) and guards.hold(gradient))
    hidden = guards.put(torch.randn(rows, 6).to(dtype))
    total = guards.put(torch.zeros(len(columns), 6))
    module.add_weight_gradient(total, torch.arange(len(columns)), gradient, hidden)
    assert total.isfinite().all()


@pytest.mark.parametrize("lengths", [[1, 1], [0, 3, 2, 0], [130, 1, 0, 1000]], ids=str)
def test_sequences(backend, kernels, guards, lengths: list[int]) -> None:
    module = kernels(torch.float32)
    bounds = guards.put(torch.tensor([0, *lengths]).cumsum(0))
    logps, ref = guards.put(-torch.rand(sum(lengths))), guards.put(-torch.rand(len(lengths)))
    sums = module.sequence_sums(logps, bounds)
    assert sums.isfinite().all() and (backend != "triton" or guards.hold(sums))
    assert all(x.isfinite().all() for x in module.pair_sigmoid(logps, bounds, ref, 0.1, 0.1))


# --- from hidden states ----------------------------------------------------------------------------------------------


def head(guards: Guards, shape: tuple[int, int, int], weight_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """hidden, weight, bias (float32: no kernel gets a copy) and labels that use the first and last row of weight."""
    rows, width, vocab = shape
    hidden, weight, labels = peaked(rows, vocab, width, sharp=3.0)
    labels[0], labels[-1] = 0, vocab - 1
    return tuple(guards.put(x) for x in (hidden.bfloat16(), weight.to(weight_dtype), torch.randn(vocab), labels))


STREAMED = pytest.mark.skipif(not STREAMS, reason="no bf16 products here")
WEIGHTS = pytest.mark.parametrize(
    ("weight_dtype", "transform"), [(torch.bfloat16, PLAIN), (torch.float32, SHARP)], ids=["bf16", "float32 capped"]
)
CPU = pytest.mark.parametrize("backend", ["cpu"], indirect=True)


@STREAMED
@CPU
@WEIGHTS
@pytest.mark.parametrize("shape", [(1, 8, 5), (33, 16, 1003), (300, 34, 4099), (17, 66, 33001)], ids=str)
@pytest.mark.parametrize("way", ["Sparse", "Frozen", "Exponentials", "recomputed"])
def test_streamed(
    backend, guards, monkeypatch, shape: tuple[int, int, int], weight_dtype: torch.dtype, transform: Transform, way: str
) -> None:
    """Each way from hidden states, what the forward leaves for the backward included; the last shape is screened."""
    module = load(backend)
    forward = module.stream_forward

    def guarded(*arguments: object, **keywords: object) -> tuple[object, ...]:
        results, tiles, whole = forward(*arguments, **keywords)
        tiles = [None if tile is None else Sparse(*map(guards.put, tile)) for tile in tiles]
        whole = None if whole is None else Exponentials(*map(guards.put, whole))
        return list(map(guards.put, results)), tiles, whole

    monkeypatch.setattr(module, "stream_forward", guarded)
    hidden, weight, bias, labels = head(guards, shape, weight_dtype)
    leaves = [hidden, weight, bias]
    wanted = leaves[: 1 if way == "Frozen" else 3]
    for leaf in wanted:
        leaf.requires_grad_()
    out = linear_token_logps(
        *(hidden, weight, labels),
        bias=bias,
        stats=STATS,
        grad_tol=TOL if way in ("Sparse", "Frozen") else 0,
        workspace_mb=0.7 * shape[0] * shape[2] / 2**20 if way == "recomputed" else 256,
        backend=backend,
        **transform._asdict(),
    )
    found = set(kept(out))
    assert found == ({None} if way == "recomputed" or (len(weight) == 5 and way != "Exponentials") else {way})
    assert all(value.isfinite().all() for value in out[:5])
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.logps.sum(), wanted))


@STREAMED
@CPU
@WEIGHTS
def test_tile_scan(backend, guards, weight_dtype: torch.dtype, transform: Transform) -> None:
    """The passes of a rank: some targets are on another."""
    module = load(backend)
    hidden, weight, bias, labels = head(guards, (40, 34, 3001), weight_dtype)
    bounds = guards.put((hidden.float() @ weight.float().T + bias).amax(1))
    labels[1::3] = len(weight)
    scan = module.TileScan()
    found = scan.rows(hidden, weight, bias, labels, bounds, transform, STATS, TOL, 256.0)
    tile = scan.choose(guards.put(torch.zeros(40, dtype=torch.float64)))
    assert tile is not None and all(value.isfinite().all() for value in found)
    logps, lse, grads = (guards.put(x) for x in (*found[:2], torch.randn(40)))
    sinks = [
        guards.empty(shape, dtype) for shape, dtype in ((hidden.shape, torch.float32), (weight.shape, weight_dtype))
    ]
    db = guards.empty(bias.shape, torch.float32)
    tile = Sparse(*map(guards.put, tile))
    module.stream_backward(hidden, weight, labels, logps, lse, grads, transform, [(0, tile)], *sinks, db, False)
    assert all(sink.isfinite().all() for sink in (*sinks, db))


# --- the same beside pages that fault --------------------------------------------------------------------------------


@pytest.mark.skipif(EDGE is not None, reason="this is the child")
@pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)
@pytest.mark.parametrize("edge", ["end", "start"])
def test_at_the_edge_of_memory(backend: str, edge: str) -> None:
    """The tests above in a child, which a read beyond a tensor would end, though it were thrown away."""
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-vv", "-x", "-k", f"{backend} and not softcap", __file__],
        env=os.environ | {"FASTDPO_TEST_EDGE": edge},
        capture_output=True,
        text=True,
    )
    said = f"{child.stdout[-1500:]}\n{child.stderr[-3000:]}"
    assert child.returncode == 0, f"a kernel reached beyond its tensor ({child.returncode}):\n{said}"
