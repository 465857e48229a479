"""Bytes that the Triton kernels load and store, counted while Triton's interpreter runs them on a CPU.

    TRITON_INTERPRET=1 python -m benchmarks.gpu_bytes            one JSON line a contender, pass and V

Logits are float16: two bytes, as bf16, which the interpreter does not always compute right.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo import eager, gpu
from fastdpo.options import Transform

from .gpu_counter import counted

VOCABULARIES = (131072, 50257, 32001)
ROWS = 8  # the row kernels'; per logit it does not matter
TILE = 128  # the column kernels': they write sums once, so that of a real tile, of more rows, less is written per logit
KEPT = 0.05  # of the columns, in clusters of neighbours
DPO_METRICS = ("entropy", "mean_logits", "is_top1")  # what TRL's DPO trainer asks for
STATISTICS = (*DPO_METRICS, "log_sum_sq_probs")
# The kernels' arguments that are [rows, columns] in the logits' dtype
BLOCKS = {"logits", "out", "probs", "gradient", "mm_ptr", "logits_ptr", "grad_logits_ptr", "X_ptr", "LOGITS"}


class Inputs(NamedTuple):
    logits: Tensor  # float16 [rows, V]
    targets: Tensor  # int64 [rows]
    grads: Tensor  # float32 [rows], of logps and of entropies
    columns: Tensor  # int32 [k], ascending: the kept ones

    @staticmethod
    def made(rows: int, vocab: int) -> Inputs:
        torch.manual_seed(0)
        logits = torch.randn(rows, vocab).half()
        starts = torch.randperm(vocab // 8)[: int(vocab * KEPT / 4)].sort().values * 8
        columns = (starts[:, None] + torch.arange(4)).flatten().int()
        return Inputs(logits, torch.randint(0, vocab, (rows,)), torch.randn(rows), columns)


PLAIN = Transform()
_Call = Callable[[], object]


def _results(inputs: Inputs) -> list[Tensor]:
    """logps, lse, entropy."""
    return [x.float() for x in eager.row_forward(inputs.logits[None].float(), inputs.targets, PLAIN, ("entropy",))]


def forward(inputs: Inputs, *stats: str) -> _Call:
    return lambda: gpu.row_forward(inputs.logits[None], inputs.targets, PLAIN, stats)


def backward(inputs: Inputs, entropy: bool = False, in_place: bool = True) -> _Call:
    logits, targets, grads, _ = inputs
    out = logits[None] if in_place else torch.empty_like(logits)[None]
    others = (*_results(inputs), grads, grads if entropy else None)
    return lambda: gpu.row_backward(logits[None], targets, *others, PLAIN, 0, out)


def mass(inputs: Inputs) -> _Call:
    lse = _results(inputs)[1]
    return lambda: gpu.column_mass(inputs.logits, lse, PLAIN)


def probs(inputs: Inputs) -> _Call:
    lse = _results(inputs)[1]
    return lambda: gpu.column_probs(inputs.logits, lse, inputs.columns, PLAIN)


def compact_gradient(inputs: Inputs) -> _Call:
    logits, targets, grads, columns = inputs
    logps, lse, _ = _results(inputs)
    p = gpu.column_probs(logits, lse, columns, PLAIN)[0]
    return lambda: gpu.compact_gradient(p, columns, targets, logps, lse, grads, PLAIN)


def trl_forward(inputs: Inputs, *stats: str) -> _Call:
    from trl.kernels import chunked_logprob

    rows = len(inputs.targets)
    sums = [torch.zeros(rows) for _ in range(7)]
    flags = [False, *(name in stats for name in chunked_logprob.OPTIONAL_OUTPUTS)]

    def tile(columns: slice, logits: Tensor) -> None:
        rest = (inputs.targets, *sums, columns.start, logits.shape[1], 1.0, 1.0, 1.0, *flags)
        chunked_logprob._forward_kernel[(rows,)](
            logits, logits.stride(0), *rest, BLOCK_SIZE=chunked_logprob._BLOCK_SIZE
        )

    return _tiles(inputs.logits, tile)


def trl_backward(inputs: Inputs, entropy: bool = False) -> _Call:
    from trl.kernels import chunked_logprob

    rows, block = len(inputs.targets), chunked_logprob._BLOCK_SIZE
    _, lse, entropies = _results(inputs)

    def tile(columns: slice, logits: Tensor) -> None:
        rest = (
            inputs.targets,
            lse,
            entropies,
            inputs.grads,
            inputs.grads,
            columns.start,
            logits.shape[1],
            1.0,
            1.0,
            1.0,
        )
        grid = (rows, -(-logits.shape[1] // block))
        chunked_logprob._backward_kernel[grid](logits, logits.stride(0), *rest, False, True, entropy, BLOCK_SIZE=block)

    return _tiles(inputs.logits, tile)


def _tiles(logits: Tensor, run: Callable[[slice, Tensor], None]) -> _Call:
    """TRL's chunks, each where its product would have been written: rows of 32,768."""
    buffer = torch.empty(len(logits), 32768, dtype=logits.dtype)

    def call() -> None:
        for start in range(0, logits.shape[1], buffer.shape[1]):
            columns = slice(start, min(start + buffer.shape[1], logits.shape[1]))
            tile = buffer[:, : columns.stop - start]
            tile.copy_(logits[:, columns])
            run(columns, tile)

    return call


def trl_from_logits(inputs: Inputs, gradients: tuple[bool, bool] | None = None) -> _Call:
    """gradients: of logps, of entropies; None: the forward."""
    from trl.kernels import selective_log_softmax_and_entropy

    logits = inputs.logits.detach().requires_grad_()
    if gradients is None:
        return lambda: selective_log_softmax_and_entropy(logits, inputs.targets)
    both = selective_log_softmax_and_entropy(logits, inputs.targets)
    outputs = [x for x, wanted in zip(both, gradients, strict=True) if wanted]
    return lambda: torch.autograd.grad(outputs, logits, [inputs.grads] * len(outputs))


def liger(inputs: Inputs, gradients: bool = False) -> _Call:
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    logits = inputs.logits.detach().requires_grad_(gradients)
    return lambda: cross_entropy_forward(logits, inputs.targets, None, -100, 0.0, 0.0, "none", None, False)


def liger_selective(inputs: Inputs) -> _Call:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    logits = torch.cat([inputs.logits, inputs.logits[-1:]])[None]  # the last position predicts nothing
    return lambda: fused_selective_log_softmax(logits, inputs.targets[None], 1.0)


# (contender, pass) -> (rows, what makes its call)
RUNS: dict[tuple[str, str], tuple[int, Callable[[Inputs], _Call]]] = {
    ("fastdpo", "forward"): (ROWS, forward),
    ("fastdpo", "forward, two rows, split"): (2, forward),
    ("fastdpo", "forward, DPO metrics"): (ROWS, lambda inputs: forward(inputs, *DPO_METRICS)),
    ("fastdpo", "forward, all statistics"): (ROWS, lambda inputs: forward(inputs, *STATISTICS)),
    ("fastdpo", "backward"): (ROWS, backward),
    ("fastdpo", "backward, out of place"): (ROWS, functools.partial(backward, in_place=False)),
    ("fastdpo", "backward, entropy"): (ROWS, functools.partial(backward, entropy=True)),
    ("fastdpo", "column mass"): (TILE, mass),
    ("fastdpo", "column probabilities"): (TILE, probs),
    ("fastdpo", "compact gradient"): (TILE, compact_gradient),
    ("TRL chunked", "forward"): (ROWS, trl_forward),
    ("TRL chunked", "forward, DPO metrics"): (ROWS, lambda inputs: trl_forward(inputs, *DPO_METRICS)),
    ("TRL chunked", "forward, all statistics"): (ROWS, lambda inputs: trl_forward(inputs, *STATISTICS)),
    ("TRL chunked", "backward"): (ROWS, trl_backward),
    ("TRL chunked", "backward, entropy"): (ROWS, functools.partial(trl_backward, entropy=True)),
    ("TRL from logits", "forward"): (ROWS, trl_from_logits),
    ("TRL from logits", "backward"): (ROWS, functools.partial(trl_from_logits, gradients=(True, False))),
    ("TRL from logits", "backward, entropy"): (ROWS, functools.partial(trl_from_logits, gradients=(True, True))),
    ("Liger CE", "forward"): (ROWS, liger),
    ("Liger CE", "forward and backward"): (ROWS, functools.partial(liger, gradients=True)),
    ("Liger selective", "forward"): (ROWS, liger_selective),
}
PER_KEPT = ("column probabilities", "compact gradient")  # bytes per kept probability, not per logit


def measure(contender: str, name: str, vocab: int) -> dict[str, Any]:
    """Bytes per logit (or kept probability): of logits or their gradients, and of everything else."""
    rows, make = RUNS[contender, name]
    inputs = Inputs.made(rows, vocab)
    call = make(inputs)
    with counted(sectors=name in PER_KEPT) as moved:
        call()
    count = rows * (len(inputs.columns) if name in PER_KEPT else vocab)

    def share(counts: Counter[str], blocks: bool) -> float:
        return round(sum(n for argument, n in counts.items() if (argument in BLOCKS) == blocks) / count, 4)

    found = {
        "loaded": share(moved.loaded, True),
        "stored": share(moved.stored, True),
        "other_loaded": share(moved.loaded, False),
        "other_stored": share(moved.stored, False),
        "bytes": round((moved.loaded.total() + moved.stored.total()) / count, 4),
    }
    return found | ({"sectors": share(moved.sectors, True)} if name in PER_KEPT else {})


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("TRITON_INTERPRET=1 must be set: bytes are counted in Triton's interpreter")
    for contender, name in RUNS:
        for vocab in VOCABULARIES:
            found = {"contender": contender, "pass": name, "vocab": vocab, **measure(contender, name, vocab)}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
