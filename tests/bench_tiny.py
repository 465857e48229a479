"""A pytest plugin for the test of the suite: tiny cases, few contenders, and four whose results are wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import cases
from fastdpo.bench import from_logits, providers
from fastdpo.bench.providers import eager


def wrong_sign(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -eager(hidden, weight, labels)


def next_label(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return eager(hidden, weight, torch.where(labels < 0, labels, (labels + 1) % len(weight)))


def scaled_gradient(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logps = eager(hidden, weight, labels)
    return logps.detach() + 1.2 * (logps - logps.detach())


def not_a_number(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return eager(hidden, weight, labels) * float("nan")


WRONG = {f.__name__: f for f in (wrong_sign, next_label, scaled_gradient, not_a_number)}


def pytest_configure() -> None:
    cases.MODELS["Tiny"] = (1024, 64)
    cases.CASES = (cases.Case("Tiny", tokens=128), cases.Case("Tiny", "logits", "padded", tokens=128))
    for name in list(providers.TOKEN_LOGPS):
        if name not in ("eager", "fastdpo"):
            del providers.TOKEN_LOGPS[name]
    for name in list(from_logits.FROM_LOGITS):
        if name not in ("eager", "fastdpo, in place"):
            del from_logits.FROM_LOGITS[name]
    providers.TOKEN_LOGPS.update(WRONG)
    from_logits.FROM_LOGITS["wrong_sign"] = lambda logits, labels: -from_logits.eager(logits, labels)
    providers.PROVIDERS = tuple(providers.TOKEN_LOGPS)
