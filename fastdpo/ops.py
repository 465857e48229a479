"""The kernels as torch ops, so that torch.compile does not break at them. Each picks its backend when it runs.

`transform` travels as its three numbers (logit_scale, softcap, temperature): an op's schema knows no tuples.
Signatures and shapes: eager.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import saved, tiles
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


# For torch.compile alone; eagerly, head.py calls tiles.py directly. A traced graph knows fixed numbers of tensors, so
# what the forward keeps travels packed, in four tensors whose sizes are known when they are there.


def _head(kernels_for, weight, bias, transform, dtype, grad_tol, workspace_mb, backend):  # type: ignore[no-untyped-def]
    kernels = choose(backend, kernels_for.device, dtype)
    return tiles.Head(weight, bias, Transform(*transform), dtype, grad_tol, workspace_mb, kernels)


_NEEDS = "bool need_hidden, bool need_weight, bool need_bias"


@torch.library.custom_op(
    "fastdpo::linear_logps",
    mutates_args=(),
    schema=(
        f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {_TRANSFORM}, str stats, "
        f"ScalarType dtype, float grad_tol, float workspace_mb, {_NEEDS}, str backend) -> Tensor[]"
    ),
)
def linear_logps(hidden, weight, bias, targets, *rest):  # type: ignore[no-untyped-def]
    """logps, lse, stats, dropped_mass; then the packed kept: layout, int32, P, floats (saved.pack).

    stats: names with commas between them, because an op with a backward of its own takes no lists.
    """
    *transform, stats, dtype, grad_tol, workspace_mb, need_hidden, need_weight, need_bias, backend = rest
    head = _head(hidden, weight, bias, transform, dtype, grad_tol, workspace_mb, backend)
    # Exact: the backward computes the logits again
    needs = (need_hidden, need_weight, need_bias) if grad_tol > 0 else (False,) * 3
    results, kept = tiles.forward(head, hidden, targets, _names(stats), needs)
    dropped = saved.dropped_mass(kept, targets, results[0].dtype)
    return [*results, dropped, *saved.pack(kept, dtype, hidden.device)]


@linear_logps.register_fake
def _(hidden, weight, bias, targets, *rest):  # type: ignore[no-untyped-def]
    *_, stats, dtype, grad_tol, _, need_hidden, need_weight, need_bias, _ = rest
    results = _empty_results(hidden, targets.shape[0], dtype, [*_names(stats), "dropped_mass"])
    keeps = grad_tol > 0 and (need_hidden or need_weight or need_bias)
    context = torch.library.get_ctx()
    count, columns, probs, floats = (context.new_dynamic_size() if keeps else 0 for _ in range(4))
    return [
        *results,
        hidden.new_empty((count, 5), dtype=torch.int64),
        hidden.new_empty(columns, dtype=torch.int32),
        hidden.new_empty(probs, dtype=dtype),
        hidden.new_empty(floats, dtype=result_dtype(dtype)),
    ]


def _names(stats: str) -> tuple[str, ...]:
    return tuple(stats.split(",")) if stats else ()


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    hidden, weight, bias, targets, *ctx.rest = inputs
    ctx.stats = _names(ctx.rest[3])
    logps, lse, *stats = output[: 2 + len(ctx.stats)]
    entropy = dict(zip(ctx.stats, stats, strict=True)).get("entropy")
    ctx.save_for_backward(hidden, weight, bias, targets, logps, lse, entropy, *output[-4:])
    ctx.set_materialize_grads(False)


def _linear_backward(ctx, grads):  # type: ignore[no-untyped-def]
    *transform, _, dtype, grad_tol, workspace_mb, need_hidden, need_weight, need_bias, backend = ctx.rest
    needs = [need_hidden, need_weight, need_bias]
    grad_entropy = dict(zip(ctx.stats, grads[2:], strict=False)).get("entropy")
    others = (None,) * (1 + len(ctx.rest))
    if grads[0] is None and grad_entropy is None:
        return None, None, None, *others
    hidden, weight, bias, targets, logps, lse, entropy, *kept = ctx.saved_tensors
    gradients = torch.ops.fastdpo.linear_backward(
        *(hidden, weight, bias, targets, logps, lse, entropy, grads[0], grad_entropy, kept, *transform),
        *(dtype, grad_tol, workspace_mb, needs, backend),
    )
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *others


torch.library.register_autograd("fastdpo::linear_logps", _linear_backward, setup_context=_keep)


@torch.library.custom_op(
    "fastdpo::linear_backward",
    mutates_args=(),
    schema=(
        f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {_ROW_GRADS}, Tensor[] kept, {_TRANSFORM}, "
        "ScalarType dtype, float grad_tol, float workspace_mb, bool[] needs, str backend) -> Tensor[]"
    ),
)
def linear_backward(hidden, weight, bias, targets, *rest):  # type: ignore[no-untyped-def]
    logps, lse, entropy, grad_logps, grad_entropy, kept, *transform, dtype, grad_tol, workspace_mb, needs, backend = (
        rest
    )
    head = _head(hidden, weight, bias, transform, dtype, grad_tol, workspace_mb, backend)
    rows = tiles.RowGrads(
        *(targets, logps, lse, entropy),
        *(None if g is None else g.contiguous() for g in (grad_logps, grad_entropy)),
    )
    return tiles.backward(head, hidden, rows, saved.unpack(kept, weight.shape[1]) if kept else None, tuple(needs))


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
