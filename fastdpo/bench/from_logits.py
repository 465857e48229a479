"""Contenders from logits, one function each: (logits [N, V], labels [N]) -> token logps [N], differentiable.

A label of -100 does not count: its logp is 0. Each does with such rows what its users get.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import token_logps


class LogitsBatch(NamedTuple):
    """Tokens of 2B sequences, chosen first."""

    logits: Tensor  # [N, V]
    labels: Tensor  # [N], -100: does not count
    lengths: tuple[int, ...]  # [2B], N in sum
    grads: Tensor  # [N], of each token logp


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    logps = torch.log_softmax(logits.to(wide), dim=-1).gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    return logps.masked_fill(labels < 0, 0)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(eager, dynamic=True)


def compiled(logits: Tensor, labels: Tensor) -> Tensor:
    """`eager` under torch.compile; dynamic, as batches differ in length."""
    return _compiled()(logits, labels)


def pytorch(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits.float(), labels, reduction="none")


def trl(logits: Tensor, labels: Tensor) -> Tensor:
    """TRL 1.16's selective_log_softmax, which its trainers run on logits; in bf16 its logps are rounded to bf16."""
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits[None], labels.clamp(min=0)[None])[0].masked_fill(labels < 0, 0)


def fast(logits: Tensor, labels: Tensor) -> Tensor:
    return token_logps(logits, labels).logps


def fast_in_place(logits: Tensor, labels: Tensor) -> Tensor:
    """The gradient is written over the logits."""
    return token_logps(logits, labels, inplace_backward=True).logps


FROM_LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "eager": eager,
    "torch.compile": compiled,
    "PyTorch": pytorch,
    "TRL 1.16": trl,
    "fastdpo": fast,
    "fastdpo, in place": fast_in_place,
}
# Named in every table, with the reason
NO_CPU_PATH = {
    "Liger": "no CPU path: its cross-entropy from logits is a Triton kernel",
    "CCE": "no CPU path: it takes hidden states, not logits",
}


def run(name: str, batch: LogitsBatch, needs: str = "both") -> list[Tensor]:
    """[logps, gradient of the logits]; needs "forward": the first alone."""
    if needs == "forward":
        with torch.no_grad():
            return [FROM_LOGITS[name](batch.logits, batch.labels)]
    logits = batch.logits.detach().requires_grad_()
    logps = FROM_LOGITS[name](logits, batch.labels)
    return [logps.detach(), *torch.autograd.grad(logps, logits, batch.grads.to(logps.dtype))]
