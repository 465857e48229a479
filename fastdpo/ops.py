"""The kernels as torch ops, so that torch.compile does not break at them. Each picks its backend when it runs.

`transform` travels as its three numbers (logit_scale, softcap, temperature): an op's schema knows no tuples.
Signatures and shapes: eager.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import tiles
from .backend import choose
from .inputs import result_dtype
from .options import Transform

_TRANSFORM = "float logit_scale, float? softcap, float temperature"


def _empty_results(like: Tensor, rows: int, dtype: torch.dtype, stats: list[str]) -> list[Tensor]:
    names = ["logps", "lse", *stats]
    return [like.new_empty(rows, dtype=torch.bool if n == "is_top1" else result_dtype(dtype)) for n in names]


# --- from logits -----------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "fastdpo::row_forward",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor targets, {_TRANSFORM}, str[] stats, str backend) -> Tensor[]",
)
def row_forward(logits, targets, logit_scale, softcap, temperature, stats, backend):  # type: ignore[no-untyped-def]
    kernels = choose(backend, logits.device, logits.dtype)
    return kernels.row_forward(logits, targets, Transform(logit_scale, softcap, temperature), tuple(stats))


@row_forward.register_fake
def _(logits, targets, logit_scale, softcap, temperature, stats, backend):  # type: ignore[no-untyped-def]
    return _empty_results(logits, targets.shape[0], logits.dtype, stats)


_ROW_GRADS = "Tensor logps, Tensor lse, Tensor? entropy, Tensor? grad_logps, Tensor? grad_entropy"


def _row_backward(logits, out, targets, logps, lse, entropy, grad_logps, grad_entropy, transform, backend):  # type: ignore[no-untyped-def]
    kernels = choose(backend, logits.device, logits.dtype)
    kernels.row_backward(logits, targets, logps, lse, entropy, grad_logps, grad_entropy, transform, 0, out)


@torch.library.custom_op(
    "fastdpo::row_backward",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor targets, {_ROW_GRADS}, {_TRANSFORM}, str backend) -> Tensor",
)
def row_backward(  # type: ignore[no-untyped-def]
    logits, targets, logps, lse, entropy, grad_logps, grad_entropy, logit_scale, softcap, temperature, backend
):
    out = logits.new_empty(logits.shape)
    transform = Transform(logit_scale, softcap, temperature)
    _row_backward(logits, out, targets, logps, lse, entropy, grad_logps, grad_entropy, transform, backend)
    return out


@row_backward.register_fake
def _(logits, targets, logps, lse, entropy, grad_logps, grad_entropy, logit_scale, softcap, temperature, backend):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


@torch.library.custom_op(
    "fastdpo::row_backward_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, Tensor targets, {_ROW_GRADS}, {_TRANSFORM}, str backend) -> ()",
)
def row_backward_(  # type: ignore[no-untyped-def]
    logits, targets, logps, lse, entropy, grad_logps, grad_entropy, logit_scale, softcap, temperature, backend
):
    transform = Transform(logit_scale, softcap, temperature)
    _row_backward(logits, logits, targets, logps, lse, entropy, grad_logps, grad_entropy, transform, backend)


@row_backward_.register_fake
def _(logits, targets, logps, lse, entropy, grad_logps, grad_entropy, logit_scale, softcap, temperature, backend):  # type: ignore[no-untyped-def]
    return None


# --- from hidden states ----------------------------------------------------------------------------------------------


# For torch.compile alone: exact, and the backward computes the logits again. Eagerly, head.py calls tiles.py directly,
# which may keep logits or compact probabilities, of sizes that a traced graph could not know.


@torch.library.custom_op(
    "fastdpo::linear_forward",
    mutates_args=(),
    schema=(
        f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {_TRANSFORM}, str[] stats, "
        "ScalarType dtype, float workspace_mb, str backend) -> Tensor[]"
    ),
)
def linear_forward(hidden, weight, bias, targets, *rest):  # type: ignore[no-untyped-def]
    *transform, stats, dtype, workspace_mb, backend = rest
    kernels = choose(backend, hidden.device, dtype)
    head = tiles.Head(weight, bias, Transform(*transform), dtype, 0.0, workspace_mb, kernels)
    return tiles.forward(head, hidden, targets, tuple(stats), (False,) * 3)[0]


@linear_forward.register_fake
def _(hidden, weight, bias, targets, *rest):  # type: ignore[no-untyped-def]
    *_, stats, dtype, _, _ = rest
    return _empty_results(hidden, targets.shape[0], dtype, stats)


@torch.library.custom_op(
    "fastdpo::linear_backward",
    mutates_args=(),
    schema=(
        f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {_ROW_GRADS}, {_TRANSFORM}, "
        "ScalarType dtype, float workspace_mb, bool[] needs, str backend) -> Tensor[]"
    ),
)
def linear_backward(hidden, weight, bias, targets, *rest):  # type: ignore[no-untyped-def]
    logps, lse, entropy, grad_logps, grad_entropy, *transform, dtype, workspace_mb, needs, backend = rest
    kernels = choose(backend, hidden.device, dtype)
    head = tiles.Head(weight, bias, Transform(*transform), dtype, 0.0, workspace_mb, kernels)
    rows = tiles.RowGrads(targets, logps, lse, entropy, grad_logps, grad_entropy)
    return tiles.backward(head, hidden, rows, None, tuple(needs))


@linear_backward.register_fake
def _(hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    needs = rest[-2]
    inputs = (hidden, weight, weight if bias is None else bias)
    return [x.new_empty(x.shape if need else (0,)) for x, need in zip(inputs, needs, strict=True)]


# --- sequences -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastdpo::sequence_sums", mutates_args=())
def sequence_sums(values: Tensor, bounds: Tensor, backend: str) -> Tensor:
    return choose(backend, values.device, values.dtype).sequence_sums(values, bounds)


@sequence_sums.register_fake
def _(values: Tensor, bounds: Tensor, backend: str) -> Tensor:
    return values.new_empty(bounds.shape[0] - 1)


@torch.library.custom_op(
    "fastdpo::pair_sigmoid",
    mutates_args=(),
    schema=(
        "(Tensor logps, Tensor bounds, Tensor? ref_logps, float beta, float label_smoothing, str backend) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
def pair_sigmoid(logps, bounds, ref_logps, beta, label_smoothing, backend):  # type: ignore[no-untyped-def]
    kernels = choose(backend, logps.device, logps.dtype)
    return kernels.pair_sigmoid(logps, bounds, ref_logps, beta, label_smoothing)


@pair_sigmoid.register_fake
def _(logps, bounds, ref_logps, beta, label_smoothing, backend):  # type: ignore[no-untyped-def]
    sequences = bounds.shape[0] - 1
    return logps.new_empty(()), logps.new_empty(sequences), logps.new_empty(sequences)
