"""Contenders from hidden states, one function each.

`TOKEN_LOGPS`: (hidden [N, H], weight [V, H], labels [N]) -> token logps [N], differentiable. Liger gives a DPO loss
only, with its gradients computed in its forward: `liger` takes the same batch as pairs. A label of -100 does not
count, and its logp is 0; each contender does with such rows what its users get. From logits: from_logits.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from .. import linear_token_logps
from . import from_logits
from .from_logits import LogitsBatch


class Batch(NamedTuple):
    """Tokens of 2B sequences, chosen first: completions alone, or (labels -100) prompts and padding too."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N], -100: does not count
    lengths: tuple[int, ...]  # [2B], N in sum
    grads: Tensor  # [N], of each token logp


AnyBatch = TypeVar("AnyBatch", bound="Batch | LogitsBatch")


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return from_logits.eager(hidden @ weight.T, labels)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(eager, dynamic=True)


def compiled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`eager` under torch.compile; dynamic, as batches differ in length."""
    return _compiled()(hidden, weight, labels)


def pytorch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch.nn.functional.linear_cross_entropy (PyTorch 2.13) in chunks, as its own options choose them."""
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none", options=LinearCrossEntropyOptions())


def trl_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What TRL 1.16's DPOTrainer runs (its chunk size; only log-probabilities asked for).

    It scores masked rows too, unless it runs on Triton.
    """
    from trl.kernels import ChunkedLogProbFunction

    counts = labels >= 0
    if hidden.is_cuda:
        logps = ChunkedLogProbFunction.apply(hidden[counts], weight, None, labels[counts], 1.0, 32768, None, 1.0, ())[0]
        return logps.new_zeros(counts.shape).masked_scatter(counts, logps)
    logps = ChunkedLogProbFunction.apply(hidden, weight, None, labels.clamp(min=0), 1.0, 32768, None, 1.0, ())[0]
    return logps.masked_fill(~counts, 0)


def cce(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """cut-cross-entropy 25.1.1; its Triton kernels need a GPU, on a CPU it runs under torch.compile."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if hidden.is_cuda else "torch_compile"
    return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl=impl)


def fast(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_token_logps(hidden, weight, labels).logps


def fast_exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_token_logps(hidden, weight, labels, grad_tol=0).logps


def fast_exact_kept(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """With a workspace that holds what CCE holds: all logits, in bf16."""
    return linear_token_logps(
        hidden, weight, labels, grad_tol=0, workspace_mb=len(labels) * len(weight) / 2**19 + 1
    ).logps


TOKEN_LOGPS = {
    "eager": eager,
    "torch.compile": compiled,
    "PyTorch": pytorch,
    "TRL 1.16": trl_chunked,
    "CCE": cce,
    "fastdpo": fast,
    "fastdpo exact": fast_exact,
    "fastdpo exact, kept": fast_exact_kept,
}
PROVIDERS = (*TOKEN_LOGPS, "Liger")
PACKAGES = {"TRL 1.16": "trl", "CCE": "cut-cross-entropy", "Liger": "liger-kernel"}  # beyond PyTorch and fastdpo
COMPILED = ("torch.compile", "CCE", "Liger")  # on a CPU
NEEDS = ("both", "frozen", "forward")


def run(name: str, batch: Batch | LogitsBatch, needs: str = "both") -> list[Tensor]:
    """[logps (Liger: loss), dX, dW]; needs "frozen": without dW, "forward": the first alone."""
    if isinstance(batch, LogitsBatch):
        return from_logits.run(name, batch, needs)
    if name == "Liger":
        return liger(batch, needs)
    if needs == "forward":
        with torch.no_grad():
            return [TOKEN_LOGPS[name](*batch[:3])]
    leaves = _leaves(batch, needs)
    logps = TOKEN_LOGPS[name](leaves[0], leaves[1] if needs == "both" else batch.weight, batch.labels)
    return [logps.detach(), *torch.autograd.grad(logps, leaves, batch.grads.to(logps.dtype))]


def liger(batch: Batch, needs: str) -> list[Tensor]:
    """Liger 0.8.5's LigerFusedLinearDPOLoss (compiled), reference logps 0, on sequences padded to the longest.

    Its forward computes the gradients.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    hidden, labels = padded(batch)
    hidden.requires_grad_(needs != "forward")
    weight = batch.weight.detach().requires_grad_(needs == "both")
    loss = LigerFusedLinearDPOLoss(use_ref_model=False)(weight, hidden, labels)[0]
    if needs == "forward":
        return [loss.detach()]
    leaves = [hidden, weight] if needs == "both" else [hidden]
    dx, *dw = torch.autograd.grad(loss, leaves)
    there = torch.arange(hidden.shape[1]) < torch.tensor(batch.lengths)[:, None]
    return [loss.detach(), dx[there], *dw]


def dpo_truth(batch: Batch) -> list[Tensor]:
    """What `liger` computes, in float32 mathematics."""
    hidden, weight = _leaves(batch._replace(hidden=batch.hidden.float(), weight=batch.weight.float()), "both")
    sums = torch.stack([x.sum() for x in eager(hidden, weight, batch.labels).split(list(batch.lengths))])
    half = len(batch.lengths) // 2
    loss = -torch.nn.functional.logsigmoid(0.1 * (sums[:half] - sums[half:])).mean()
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]


def padded(batch: Batch) -> tuple[Tensor, Tensor]:
    """hidden `[2B, T, H]`, labels `[2B, T]` with -100."""
    hidden = torch.nn.utils.rnn.pad_sequence(list(batch.hidden.split(list(batch.lengths))), batch_first=True)
    labels = list(batch.labels.split(list(batch.lengths)))
    return hidden, torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)


def first_tokens(batch: AnyBatch, each: int) -> AnyBatch:
    """`each` tokens of each sequence (all, if it has fewer), the first that count; a quarter of them masked before."""
    rows, lengths = [], []
    for part in torch.arange(len(batch.labels)).split(list(batch.lengths)):
        counts = (batch.labels[part] >= 0).nonzero()
        start = max(0, int(counts[0]) - each // 4) if len(counts) else 0
        start = max(0, min(start, len(part) - each))
        rows.append(part[start : start + each])
        lengths.append(len(rows[-1]))
    few = torch.cat(rows)
    fields: dict[str, Any] = {name: getattr(batch, name)[few] for name in (batch._fields[0], "labels", "grads")}
    return cast(AnyBatch, batch._replace(**fields, lengths=tuple(lengths)))


def _leaves(batch: Batch, needs: str) -> list[Tensor]:
    leaves = [batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_()]
    return leaves if needs == "both" else leaves[:1]
