"""The differentiable op of the package: token log-probabilities, from logits or from hidden states.

    logps[i] = z[i, y_i] - logsumexp_v z[i, v],   z = softcap * tanh(logits * logit_scale / softcap) / temperature

Everything a preference loss needs from the LM head. The kernels behind it: ops.py, backend.py; the tiles: tiles.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import tiles
from .backend import choose
from .batch import IGNORE_INDEX, flat_targets
from .inputs import as_rows, check_linear, product_dtype, rows_apart
from .options import HeadOptions, head_options
from .parallel import VocabParallel, plain
from .saved import dropped_mass, flatten, unflatten

_DEFAULT = HeadOptions()
_DIFFERENTIABLE = ("logps", "entropy")


class TokenLogps(NamedTuple):
    """Per-token results, each shaped like labels and 0 where the label is ignored; None where not asked for.

    float32 (float64 from float64 inputs); is_top1 is bool. `logps` and `entropy` are differentiable.
    """

    logps: Tensor
    entropy: Tensor | None = None  # -sum_v p_v log p_v, in nats
    mean_logits: Tensor | None = None  # mean over the vocabulary of the transformed logits
    is_top1: Tensor | None = None  # the label is the first maximum
    log_sum_sq_probs: Tensor | None = None  # log sum_v p_v^2 (WPO, arXiv 2406.11827)
    lse: Tensor | None = None  # logsumexp of the transformed logits
    dropped_mass: Tensor | None = None  # probability outside the kept columns; 0 where the path is exact


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    stats: Sequence[str] = (),
    inplace_backward: bool = False,
    backend: str = "auto",
    vocab_parallel: VocabParallel | None = None,
) -> TokenLogps:
    """Log-probability of each label, from logits. Reads each logit once; the backward reads and writes each once.

    Args:
        logits: `[..., V]`, float32, bf16, fp16 or float64; any strides (only the last dimension must be dense,
            or the logits are copied).
        labels: int64 or int32 `[...]`, the target of each row of logits; rows with `ignore_index` are not read.
        ignore_index: the label that does not count.
        shift: Hugging Face's convention: row t predicts labels[..., t+1]; the last row counts not at all. Spares the
            copy that `logits[:, :-1]` costs elsewhere.
        temperature: divides the logits, last.
        softcap: z -> softcap * tanh(z / softcap) after the scale (Gemma 2's final_logit_softcapping).
        logit_scale: multiplies the logits, first (Cohere; 1/logits_scaling for Granite).
        stats: names of further results: entropy, mean_logits, is_top1, log_sum_sq_probs, lse, dropped_mass.
        inplace_backward: allow the backward to write the gradient over the logits, when nothing else needs them.
            Under torch.compile the gradient is a new tensor all the same.
        backend: "auto" (by device; falls back to "eager" with one warning), "triton", "cpu" or "eager".
        vocab_parallel: logits are this rank's share of the vocabulary; labels are ids of the whole. Without is_top1.

    Raises:
        TypeError: logits are not floats, labels not integers.
        ValueError: shapes that disagree; a label outside [0, V) that is not ignore_index; an unknown stat or backend.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    options = head_options(
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        stats=stats,
        inplace_backward=inplace_backward,
        backend=backend,
        vocab_parallel=vocab_parallel,
    )
    return from_logits(logits, labels, options)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    stats: Sequence[str] = (),
    grad_tol: float | str = "auto",
    workspace_mb: float = 256,
    backend: str = "auto",
    vocab_parallel: VocabParallel | None = None,
) -> TokenLogps:
    """Log-probability of each label under logits = hidden @ weight.T + bias, which never exist as a whole.

    Args:
        hidden: `[..., H]`. Rows whose label is ignored are dropped before the product.
        weight: `[V, H]`, the LM head. hidden, weight and bias may differ in float dtype: the product runs in
            autocast's dtype under autocast, else in hidden's; each gradient has the dtype of its input. A DTensor
            (FSDP2) is gathered once a call, its gradient averaged over the ranks and scattered; likewise bias.
        labels: int64 or int32 `[...]`, hidden's shape without H.
        bias: `[V]` or None.
        grad_tol: probability per token, on average over a tile, that the gradient may leave out: the backward runs on
            the vocabulary columns that hold the rest (fastdpo/compaction.py, which states the bound), a few percent
            of them on real text. 0: exact. "auto": 2^-10 for bf16 and fp16 products, 0 for float32. The gradient of
            `entropy` is always exact. On a CPU with bf16 products, columns that hold less than a 256th of it for every
            token are summed from 8-bit products (kernels/cpu/screen.h), which moves logps (by 1e-5 on average on real
            text) and ties that little of them to the other tokens of their tile.
        workspace_mb: MiB that the logits tile may take. In exact mode, logits that fit whole are kept for the
            backward, which spares computing them twice.
        vocab_parallel: weight and bias are this rank's rows of the head; labels are ids of the whole vocabulary.
        ignore_index, shift, temperature, softcap, logit_scale, stats, backend: as for `token_logps`.

    Raises:
        ValueError: as `token_logps`; hidden and weight of different H.
        TypeError, RuntimeError: as `token_logps`.
    """
    options = head_options(
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        stats=stats,
        grad_tol=grad_tol,
        workspace_mb=workspace_mb,
        backend=backend,
        vocab_parallel=vocab_parallel,
    )
    return from_hidden(hidden, weight, labels, bias, options)


def from_logits(logits: Tensor, labels: Tensor, options: HeadOptions) -> TokenLogps:
    """`token_logps` with its keywords checked and packed."""
    return _named(TokenLogpsFunction.apply(logits, labels, options), options)


def from_hidden(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, options: HeadOptions
) -> TokenLogps:
    """`linear_token_logps` with its keywords checked and packed."""
    parallel = options.vocab_parallel
    weight, bias = plain(weight, parallel), None if bias is None else plain(bias, parallel)
    check_linear(hidden, weight, labels, bias)
    if not torch.is_grad_enabled():  # a Function is told of requires_grad alone, and would keep columns for no backward
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    apply = _traced_linear if torch.compiler.is_compiling() else LinearTokenLogpsFunction.apply
    return _named(apply(hidden, weight, labels, bias, options), options)


def first_order(backward: Any) -> Any:
    """A backward that raises where its result would have to be differentiated again (create_graph=True)."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("fastdpo: second derivatives (create_graph=True) are not supported")
        return backward(ctx, *grads)

    return checked


class TokenLogpsFunction(Function):
    """`TokenLogpsFunction.apply(logits, labels) -> logps`: the bare drop-in, with the defaults of `token_logps`.

    With a third argument, `HeadOptions` that ask for stats, it returns (logps, *stats).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, options: HeadOptions = _DEFAULT) -> Any:
        rows = as_rows(logits, labels)
        targets = _targets(labels, logits, -1, options)
        kernel_stats = _kernel_stats(options)
        results = torch.ops.fastdpo.row_forward(rows, targets, *options.transform, kernel_stats, options.backend)
        if options.vocab_parallel is not None:
            results, _ = options.vocab_parallel.merge(results, targets, tuple(kernel_stats))
        by_name = dict(zip(("logps", "lse", *kernel_stats), results, strict=True))
        ctx.save_for_backward(rows, targets, by_name["logps"], by_name["lse"], by_name.get("entropy"))
        ctx.options, ctx.shape = options, logits.shape
        return _outputs(ctx, by_name, labels.shape, options)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        grad_logps, grad_entropy = _flat_grads(grads, ctx.options)
        if not ctx.needs_input_grad[0] or (grad_logps is None and grad_entropy is None):
            return None, None, None
        rows, targets, logps, lse, entropy = ctx.saved_tensors
        return (
            _logits_gradient(ctx.options, rows, (targets, logps, lse, entropy, grad_logps, grad_entropy), ctx.shape),
            None,
            None,
        )


class LinearTokenLogpsFunction(Function):
    """`LinearTokenLogpsFunction.apply(hidden, weight, labels) -> logps`, with the defaults of `linear_token_logps`.

    Further arguments: bias, and `HeadOptions`; options that ask for stats make it return (logps, *stats). Applied in a
    function that torch.compile traces, its gradient is exact, of recomputed logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        options: HeadOptions = _DEFAULT,
    ) -> Any:
        check_linear(hidden, weight, labels, bias)
        targets = _targets(labels, weight, 0, options)
        dtype = product_dtype(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        kernel_stats = _kernel_stats(options)
        saved = None
        if torch.compiler.is_compiling():
            results = _linear_op(flat, weight, bias, targets, kernel_stats, dtype, 0.0, [False] * 3, options)
            results = results[: 2 + len(kernel_stats)]
        else:
            head = _head(options, weight, bias, dtype, hidden.device)
            with torch.autocast(hidden.device.type, enabled=False):
                needs = _linear_needs(ctx.needs_input_grad, bias)
                results, saved = tiles.forward(head, flat, targets, tuple(kernel_stats), needs)
        by_name = dict(zip(("logps", "lse", *kernel_stats), results, strict=True))
        if saved is not None and "dropped_mass" in options.stats:
            by_name["dropped_mass"] = dropped_mass(saved, targets, by_name["logps"].dtype)
            if options.vocab_parallel is not None:
                options.vocab_parallel.sum_(by_name["dropped_mass"])
        ctx.saved_layout, kept = flatten(saved)
        ctx.save_for_backward(
            *(flat, weight, bias, targets, by_name["logps"], by_name["lse"], by_name.get("entropy"), *kept)
        )
        ctx.options, ctx.shape, ctx.dtype = options, hidden.shape, dtype
        return _outputs(ctx, by_name, labels.shape, options)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logps, grad_entropy = _flat_grads(grads, ctx.options)
        if grad_logps is None and grad_entropy is None:
            return None, None, None, None, None
        hidden, weight, bias, targets, logps, lse, entropy, *kept = ctx.saved_tensors
        row_grads = tiles.RowGrads(targets, logps, lse, entropy, grad_logps, grad_entropy)
        options, needs = ctx.options, _linear_needs(ctx.needs_input_grad, bias)
        if torch.compiler.is_compiling():
            dx, dw, db = torch.ops.fastdpo.linear_backward(
                *(hidden, weight, bias, *row_grads, [], *options.transform),
                *(ctx.dtype, 0.0, options.workspace_mb, list(needs), options.backend),
            )
        else:
            saved = unflatten(ctx.saved_layout, kept)
            if saved is not None and saved.logits is not None:
                ctx.saved_layout = None  # overwritten below: a second backward (retain_graph) computes them again
            head = _head(options, weight, bias, ctx.dtype, hidden.device)
            with torch.autocast(hidden.device.type, enabled=False):
                dx, dw, db = tiles.backward(head, hidden, row_grads, saved, needs)
        dx = dx.view(ctx.shape) if needs[0] else None
        return dx, dw if needs[1] else None, None, db if needs[2] else None, None


def _traced_linear(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, options: HeadOptions) -> Any:
    """LinearTokenLogpsFunction for torch.compile, which cannot know what that saves: one op with its own backward."""
    targets = flat_targets(labels, weight.shape[0], options.ignore_index, options.shift)
    dtype, stats = product_dtype(hidden), _kernel_stats(options)
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight, bias)]
    flat = hidden.reshape(-1, hidden.shape[-1])
    results = _linear_op(flat, weight, bias, targets, stats, dtype, _grad_tol(options, dtype), needs, options)
    by_name = dict(zip(("logps", "lse", *stats, "dropped_mass"), results, strict=False))
    outputs = [by_name["logps"]]
    outputs += [by_name[name] if name in _DIFFERENTIABLE else by_name[name].detach() for name in options.stats]
    shaped = tuple(out.view(labels.shape) for out in outputs)
    return shaped if options.stats else shaped[0]


def _linear_op(
    flat: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: list[str],
    dtype: torch.dtype,
    grad_tol: float,
    needs: list[bool],
    options: HeadOptions,
) -> list[Tensor]:
    return torch.ops.fastdpo.linear_logps(
        *(flat, weight, bias, targets, *options.transform, ",".join(stats)),
        *(dtype, grad_tol, options.workspace_mb, *needs, options.backend),
    )


# --- shared by the two Functions -------------------------------------------------------------------------------------


def _head(
    options: HeadOptions, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device
) -> tiles.Head:
    return tiles.Head(
        *(weight, bias, options.transform, dtype, _grad_tol(options, dtype), options.workspace_mb),
        *(choose(options.backend, device, dtype), options.vocab_parallel),
    )


def _targets(labels: Tensor, of: Tensor, dim: int, options: HeadOptions) -> Tensor:
    """int64 `[N]`, -1 where ignored, of this rank's part of the vocabulary: dimension `dim` of weight or logits."""
    rows, parallel = of.shape[dim], options.vocab_parallel
    if parallel is None:
        return flat_targets(labels, rows, options.ignore_index, options.shift)
    parallel.check("weight" if dim == 0 else "logits", rows)
    return parallel.local(flat_targets(labels, parallel.vocab, options.ignore_index, options.shift))


def _grad_tol(options: HeadOptions, dtype: torch.dtype) -> float:
    if options.grad_tol is not None:
        return options.grad_tol
    # "auto": below the rounding of the dtype
    return 2.0**-10 if dtype in (torch.bfloat16, torch.float16) else 0.0


def _linear_needs(needs_input_grad: tuple[bool, ...], bias: Tensor | None) -> tuple[bool, ...]:
    """Which of hidden, weight, bias need a gradient; apply() may have been called without the bias."""
    return needs_input_grad[0], needs_input_grad[1], bias is not None and needs_input_grad[3]


def _logits_gradient(
    options: HeadOptions, rows: Tensor, row_grads: tuple[Tensor | None, ...], shape: torch.Size
) -> Tensor:
    if options.inplace_backward and not torch.compiler.is_compiling() and rows_apart(rows):
        torch.ops.fastdpo.row_backward_(rows, *row_grads, *options.transform, options.backend)
        return rows.view(shape)
    return torch.ops.fastdpo.row_backward(rows, *row_grads, *options.transform, options.backend).view(shape)


def _kernel_stats(options: HeadOptions) -> list[str]:
    # Kernels return lse always; dropped_mass is no row statistic
    return [s for s in options.stats if s not in ("lse", "dropped_mass")]


def _outputs(ctx: Any, by_name: dict[str, Tensor], shape: torch.Size, options: HeadOptions) -> Any:
    """logps alone, or (logps, *stats), shaped like labels."""
    ctx.set_materialize_grads(False)
    # view(): an output must not be a tensor that is also saved
    logps = by_name["logps"].view(shape)
    if not options.stats:
        return logps
    outputs = [logps]
    for name in options.stats:
        value = by_name.get(name)  # dropped_mass is not there where the path is exact
        outputs.append(torch.zeros_like(logps) if value is None else value.view(shape))
    ctx.mark_non_differentiable(
        *(out for name, out in zip(options.stats, outputs[1:], strict=True) if name not in _DIFFERENTIABLE)
    )
    return tuple(outputs)


def _flat_grads(grads: tuple[Tensor | None, ...], options: HeadOptions) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of logps and entropy among those of all outputs, each flat `[N]`."""
    by_name = dict(zip(("logps", *options.stats), grads, strict=True))
    flat = [by_name.get(name) for name in _DIFFERENTIABLE]
    logps, entropy = (None if g is None else g.reshape(-1).contiguous() for g in flat)
    return logps, entropy


def _named(outputs: Any, options: HeadOptions) -> TokenLogps:
    if not options.stats:
        return TokenLogps(outputs)
    return TokenLogps(outputs[0], **dict(zip(options.stats, outputs[1:], strict=True)))
