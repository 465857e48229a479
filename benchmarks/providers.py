"""Contenders from hidden states: each (hidden [N, H], weight [V, H], labels [N]) -> token logps [N], differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

import fastdpo


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
    return fastdpo.linear_token_logps(hidden, weight, labels).logps


def fast_exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return fastdpo.linear_token_logps(hidden, weight, labels, grad_tol=0).logps


PROVIDERS = {"eager": eager, "TRL 1.16": trl_chunked, "CCE": cce, "fastdpo": fast, "fastdpo exact": fast_exact}
