"""Contenders from hidden states, one function each.

`TOKEN_LOGPS`: (hidden [N, H], weight [V, H], labels [N]) -> token logps [N], differentiable. Liger gives a DPO loss
only, with its gradients computed in its forward: `liger` takes the same batch as pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import linear_token_logps


class Batch(NamedTuple):
    """Completion tokens of 2B sequences, chosen first."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N]
    lengths: tuple[int, ...]  # [2B], N in sum
    grads: Tensor  # [N], of each token logp


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    return torch.log_softmax(logits, dim=-1).gather(-1, labels[:, None]).squeeze(-1)


def trl_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What TRL 1.16's DPOTrainer runs (its chunk size; only log-probabilities asked for)."""
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ())[0]


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
    "TRL 1.16": trl_chunked,
    "CCE": cce,
    "fastdpo": fast,
    "fastdpo exact": fast_exact,
    "fastdpo exact, kept": fast_exact_kept,
}
PROVIDERS = (*TOKEN_LOGPS, "Liger")
NEEDS = ("both", "frozen", "forward")


def run(name: str, batch: Batch, needs: str = "both") -> list[Tensor]:
    """[logps (Liger: loss), dX, dW]; needs "frozen": without dW, "forward": the first alone."""
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

    It takes one weight gradient whether or not it is needed. Its forward computes the gradients.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    hidden, labels = padded(batch)
    hidden.requires_grad_()
    weight = batch.weight.detach().requires_grad_(needs == "both")
    loss = LigerFusedLinearDPOLoss(use_ref_model=False)(weight, hidden, labels)[0]
    if needs == "forward":
        return [loss.detach()]
    leaves = [hidden, weight] if needs == "both" else [hidden]
    dx, *dw = torch.autograd.grad(loss, leaves)
    return [loss.detach(), dx[labels != -100], *dw]


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


def first_tokens(batch: Batch, each: int) -> Batch:
    """The first tokens of each sequence."""
    lengths = tuple(min(each, length) for length in batch.lengths)
    rows = torch.cat([part[:each] for part in torch.arange(len(batch.labels)).split(list(batch.lengths))])
    return Batch(batch.hidden[rows], batch.weight, batch.labels[rows], lengths, batch.grads[rows])


def _leaves(batch: Batch, needs: str) -> list[Tensor]:
    leaves = [batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_()]
    return leaves if needs == "both" else leaves[:1]
