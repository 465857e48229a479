"""What each rank of tests/test_parallel.py does."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from heads import peaked
from torch import Tensor

import fastdpo
from fastdpo import VocabParallel


class Case(NamedTuple):
    """A head, how it is split, and how it is called."""

    name: str
    sizes: tuple[int, ...] = (1200, 1801)  # rows of each rank; V = 3001 in all
    dtype: torch.dtype = torch.float32
    backend: str = "eager"
    bias: bool = False
    frozen: bool = False  # weight needs no gradient
    tokens: int = 300
    nothing: bool = False  # no label counts
    forward: bool = False  # no gradient
    others: bool = False  # the first rank's columns are far below the others'
    keywords: dict[str, Any] = {}  # noqa: RUF012

    def inputs(self) -> dict[str, Tensor]:
        """hidden, weight, bias, labels; and the gradients of logps and entropy."""
        hidden, weight, labels = peaked(self.tokens, sum(self.sizes))
        if self.others:
            first = self.sizes[0]
            weight = torch.cat([1e-3 * weight[:first], weight[: len(weight) - first]])  # the likely rows are rank 1's
            labels = first + labels % (len(weight) - first)
        labels[:: 1 if self.nothing else 7] = -100
        generator = torch.Generator().manual_seed(1)
        one = {"bias": torch.randn(len(weight), generator=generator)} if self.bias else {}
        floats = {"hidden": hidden, "weight": weight, **one}
        grads = torch.randn(2, self.tokens, generator=generator)
        return {name: x.to(self.dtype) for name, x in floats.items()} | {"labels": labels, "grads": grads}

    @property
    def stats(self) -> tuple[str, ...]:
        return tuple(self.keywords.get("stats", ()))


def linear(case: Case, parallel: VocabParallel | None = None) -> dict[str, Tensor]:
    """Results, gradients, and the bytes that the forward kept for the backward; of this rank's rows, or of all."""
    x = case.inputs()
    rows = slice(None) if parallel is None else slice(parallel.start, parallel.stop)
    leaves = {"hidden": x["hidden"], "weight": x["weight"][rows].clone()}
    if case.bias:
        leaves["bias"] = x["bias"][rows].clone()
    for name, leaf in leaves.items():
        leaf.requires_grad_(not case.forward and (name == "hidden" or not case.frozen))
    given = {leaf.data_ptr() for leaf in leaves.values()}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in given:
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = fastdpo.linear_token_logps(
            leaves["hidden"],
            leaves["weight"],
            x["labels"],
            bias=leaves.get("bias"),
            backend=case.backend,
            vocab_parallel=parallel,
            **case.keywords,
        )
    return _gradients(case, out, x, leaves) | {"kept": torch.tensor(sum(kept))}


def from_logits(case: Case, parallel: VocabParallel | None = None) -> dict[str, Tensor]:
    x = case.inputs()
    rows = slice(None) if parallel is None else slice(parallel.start, parallel.stop)
    logits = (x["hidden"] @ x["weight"].T)[:, rows].clone().requires_grad_()
    out = fastdpo.token_logps(logits, x["labels"], backend=case.backend, vocab_parallel=parallel, **case.keywords)
    return _gradients(case, out, x, {"logits": logits})


def _gradients(case: Case, out: Any, x: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    if case.forward:
        return {"logps": out.logps}
    value = (out.logps * x["grads"][0]).sum()
    if "entropy" in case.stats:
        value = value + (out.entropy * x["grads"][1]).sum()
    value.backward()
    found = {"logps": out.logps.detach()} | {name: getattr(out, name).detach() for name in case.stats}
    return found | {f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


def vocab_parallel(rank: int, calls: list[tuple[Any, Case]]) -> list[dict[str, Tensor]]:
    return [call(case, VocabParallel(case.sizes[rank])) for call, case in calls]
